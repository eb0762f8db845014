//! Requests that are as they should be but for one field, and requests that are wrong all over.

use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, Value};

/// What a field is in a request that could be meant.
pub(crate) type Usual<'a> = &'a dyn Fn(&FieldDescriptor) -> Option<Value>;

/// A request with what is wrong with it, for messages.
pub(crate) struct Wrong {
    pub(crate) what: String,
    pub(crate) message: DynamicMessage,
}

/// A request in which every field is as usual.
pub(crate) fn usual(descriptor: &MessageDescriptor, values: Usual<'_>) -> DynamicMessage {
    let mut message = DynamicMessage::new(descriptor.clone());
    for field in descriptor.fields() {
        if let Some(value) = value_of(&field, values) {
            message.set_field(&field, value);
        }
    }
    message
}

fn value_of(field: &FieldDescriptor, values: Usual<'_>) -> Option<Value> {
    if let Some(value) = values(field) {
        return Some(value);
    }
    match field.kind() {
        Kind::Message(inner) if !field.is_list() => Some(Value::Message(usual(&inner, values))),
        _ => None,
    }
}

/// Every request that is as usual but for one field, at any depth, which is missing, huge or malformed.
pub(crate) fn wrong_in_one_field(descriptor: &MessageDescriptor, values: Usual<'_>) -> Vec<Wrong> {
    let whole = usual(descriptor, values);
    let mut all = Vec::new();
    for field in descriptor.fields() {
        let mut put = |what: String, value: Option<Value>| {
            let mut message = whole.clone();
            match value {
                Some(value) => message.set_field(&field, value),
                None => message.clear_field(&field),
            }
            all.push(Wrong {
                what: format!("{}: {what}", field.name()),
                message,
            });
        };
        if field.kind() != Kind::Bool && whole.has_field(&field) {
            put("missing".to_owned(), None);
        }
        let bad = bad_values(&field, values);
        if !field.is_list() {
            bad.into_iter().for_each(|(what, value)| put(what, Some(value)));
            continue;
        }
        let first = bad.first().map(|(_, value)| value.clone());
        for (what, value) in bad {
            put(format!("one, {what}"), Some(Value::List(vec![value])));
        }
        let usual_one = match field.kind() {
            Kind::Message(inner) => Some(Value::Message(usual(&inner, values))),
            _ => first,
        };
        if let Some(one) = usual_one {
            put("ten thousand".to_owned(), Some(Value::List(vec![one; 10_000])));
        }
    }
    all
}

/// What one value of this field must not be. A bool has no such value.
fn bad_values(field: &FieldDescriptor, values: Usual<'_>) -> Vec<(String, Value)> {
    let named = |pairs: Vec<(&str, Value)>| {
        pairs
            .into_iter()
            .map(|(what, value)| (what.to_owned(), value))
            .collect()
    };
    match field.kind() {
        Kind::String => bad_texts()
            .into_iter()
            .map(|(what, text)| (what.to_owned(), Value::String(text)))
            .collect(),
        Kind::Bytes => named(vec![
            ("1 MiB", Value::Bytes(vec![0xa5; 1 << 20].into())),
            ("garbage", Value::Bytes(vec![0xff; 100].into())),
        ]),
        Kind::Uint64 => named(vec![
            ("2^64 - 1", Value::U64(u64::MAX)),
            ("2^63", Value::U64(1 << 63)),
            ("2^63 - 1", Value::U64(u64::MAX >> 1)),
            ("an odd number", Value::U64(12_345_677)),
        ]),
        Kind::Uint32 => named(vec![("2^32 - 1", Value::U32(u32::MAX)), ("2^31", Value::U32(1 << 31))]),
        Kind::Double => named(vec![
            ("not a number", Value::F64(f64::NAN)),
            ("infinite", Value::F64(f64::INFINITY)),
            ("negative", Value::F64(-1e300)),
        ]),
        Kind::Message(inner) => wrong_in_one_field(&inner, values)
            .into_iter()
            .map(|wrong| (wrong.what, Value::Message(wrong.message)))
            .collect(),
        _ => Vec::new(),
    }
}

fn bad_texts() -> Vec<(&'static str, String)> {
    vec![
        ("a NUL", "a\0b".to_owned()),
        ("two lines", "a\nHB seq=1\r\n".to_owned()),
        ("1 MiB", "x".repeat(1 << 20)),
        ("a way out", "../../../etc/passwd".to_owned()),
        ("a path", "/dev/null".to_owned()),
        ("no word of any list", "sometimes".to_owned()),
        ("SQL", "g'; DROP TABLE instances; --".to_owned()),
        ("a negative number", "-1".to_owned()),
        ("letters of no ASCII", "ünïcødé\u{202e}\u{1f600}".to_owned()),
        ("nearly a UUID", "00000000-0000-0000-0000-00000000000g".to_owned()),
    ]
}

/// Numbers that look random and are the same for the same seed (splitmix64).
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % sides as u64) as usize
    }

    /// A request of which each field is missing, as usual or wrong, but one at least is wrong.
    pub(crate) fn wrong_all_over(&mut self, descriptor: &MessageDescriptor, values: Usual<'_>) -> Option<Wrong> {
        let mut singles = wrong_in_one_field(descriptor, values);
        // Many of them would be larger than a message may be.
        singles.retain(|wrong| !wrong.what.contains("1 MiB") && !wrong.what.contains("ten thousand"));
        if singles.is_empty() {
            return None;
        }
        let mut at = self.roll(singles.len());
        let Wrong { mut what, mut message } = singles.swap_remove(at);
        let kept = what.split(':').next().unwrap_or_default().to_owned();
        for _ in 0..self.roll(4) {
            if singles.is_empty() {
                break;
            }
            at = self.roll(singles.len());
            let other = singles.swap_remove(at);
            let name = other.what.split(':').next().unwrap_or_default().to_owned();
            let field = descriptor.get_field_by_name(&name);
            if let Some(field) = field.filter(|_| name != kept) {
                message.set_field(&field, other.message.get_field(&field).into_owned());
                what = format!("{what}; {}", other.what);
            }
        }
        Some(Wrong { what, message })
    }
}
