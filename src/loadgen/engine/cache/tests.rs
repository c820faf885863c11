//! The cache by itself, against a naive model, and against recorded engines.
