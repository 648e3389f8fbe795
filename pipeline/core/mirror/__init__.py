"""A copy of a run directory elsewhere, on a shared disk or in object storage, that a run can be gone on with."""
