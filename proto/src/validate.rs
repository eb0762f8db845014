//! Checks on what a peer sent, each naming the field.

use uuid::Uuid;

/// A field of a received message that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("field {field}: {problem}")]
pub struct InvalidField {
    /// The field's name.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

/// Reads a UUID field.
///
/// # Errors
/// The text is not a UUID.
pub fn wire_uuid(field: &'static str, text: &str) -> Result<Uuid, InvalidField> {
    Uuid::parse_str(text).map_err(|_| {
        let shown: String = text.chars().take(64).collect();
        InvalidField {
            field,
            problem: format!("{shown:?} is not a UUID"),
        }
    })
}

/// Reads a message field that may not be absent.
///
/// # Errors
/// It is absent.
pub fn required<T>(field: &'static str, value: Option<T>) -> Result<T, InvalidField> {
    value.ok_or_else(|| InvalidField {
        field,
        problem: "is missing".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_uuid_names_its_field() {
        let error = wire_uuid("migration", "../../etc").unwrap_err();
        assert_eq!(error.to_string(), r#"field migration: "../../etc" is not a UUID"#);
    }

    #[test]
    fn an_absent_message_names_its_field() {
        assert_eq!(
            required::<u8>("spec", None).unwrap_err().to_string(),
            "field spec: is missing"
        );
    }
}
