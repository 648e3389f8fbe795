"""A trained agent as a server: what `exsearch serve` runs.

    settings      every setting with its default
    service       which questions are answered when: limits, deadlines, drain, reload
    following     newer iterations of a run
    failures      what clients are told when a request fails
    conversation  messages -> the question that the agent gets
    citations     where an answer comes from
    told          one answer, for programs: its steps, tokens and citations
    streams       events as they happen, over HTTP
    chat          /v1/chat/completions
    responses     /v1/responses
    app           all routes, and the process around them
    tools         the agent as tools for other agents (MCP)

It knows the agent as `service.Agent`; the real one is `actors.answering.AnsweringAgent`.
"""

from importlib.resources import files

STATIC = files("pipeline.serve") / "static"
"""The page for people."""
