//! The index and what it stands on, alone: these layers know nothing of the others.

#[path = "../../../src"]
mod layers {
    pub mod hash;
    pub mod index;
    pub mod model;
}

pub use layers::{hash, index, model};
