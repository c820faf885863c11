//! x
mod decode;
mod model;
mod model_tests;
mod truth;
