//! Percentiles, intervals and knees. Pure.
