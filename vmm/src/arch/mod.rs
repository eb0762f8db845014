//! What depends on the processor architecture. There is one so far.

pub(crate) mod x86_64;
