//! An error with its causes as one line, for records, answers and reasons that travel as text.

use std::error::Error;

/// What failed and why, down to the first cause. A cause whose words stand at the end already is not said twice.
#[must_use]
pub fn error_chain(error: &dyn Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
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
        assert_eq!(error_chain(&Wrapper::Silent(cause())), "could not map memory: no room");
        assert_eq!(error_chain(&Wrapper::Telling(cause())), "could not map memory: no room");
    }
}
