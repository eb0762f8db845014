//! Ferry's chores.
fn main() {}
