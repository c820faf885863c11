//! What a run saw, as numbers of the report.
