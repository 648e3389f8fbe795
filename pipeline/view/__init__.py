"""A run as pages for a browser: what `exsearch view` serves, and writes as files.

    sources     which trajectories a run has, and their files
    stored      what is read of these files
    questions   what a run was asked
    rows        a line per question, for the table
    places      where each question is
    details     the trajectories of some questions, as text
    pages       all of it, by the name of its page
    server      the pages over HTTP
    export      the pages as files that open from a disk

No run is written into.
"""

from importlib.resources import files

STATIC = files("pipeline.view") / "static"
"""What a browser loads beside the data."""
