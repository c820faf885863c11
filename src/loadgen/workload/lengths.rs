//! How long prompts and answers are.

/// A distribution of lengths, tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lengths {
    /// Always the same.
    Fixed(u32),
}
