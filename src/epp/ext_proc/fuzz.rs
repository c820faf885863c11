//! Invariants of an exchange, checked from outside.
