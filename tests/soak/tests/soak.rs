//! The tests of `tests/it/differential.rs`.

#[path = "../../it"]
mod it {
    mod differential;
}
