//! Errors as one line, for records and answers.

use std::error::Error;

/// An error with all its causes. A cause whose words stand at the end already is not said twice.
pub(crate) fn error_chain(error: &(dyn Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let said = source.to_string();
        if !words.ends_with(&said) {
            words.push_str(": ");
            words.push_str(&said);
        }
        cause = source.source();
    }
    words
}
