//! Stacks of the load driver: what each policy does with requests, and that no process is left.

mod client;
mod ends;
mod policies;
pub(crate) mod rig;
