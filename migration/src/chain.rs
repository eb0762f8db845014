//! An error with its causes, for a reason that travels as text or is reported.

use std::error::Error;

/// What failed and why, down to the first cause.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        // A wrapper says what it wraps.
        if !words.ends_with(&said) {
            words = format!("{words}: {said}");
        }
        cause = error.source();
    }
    words
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Wrapper {
        #[error("could not map memory")]
        Silent(#[source] io::Error),
        #[error("could not map memory: {0}")]
        Telling(#[source] io::Error),
    }

    #[test]
    fn each_cause_is_said_once() {
        let cause = || io::Error::other("no room");
        assert_eq!(chain(&Wrapper::Silent(cause())), "could not map memory: no room");
        assert_eq!(chain(&Wrapper::Telling(cause())), "could not map memory: no room");
    }
}
