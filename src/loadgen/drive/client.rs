//! See [the module above](super).
