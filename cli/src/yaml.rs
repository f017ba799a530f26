//! YAML as plain values, within bounds, and what is wrong with a text in words that do not presume a parser. It must
//! not know what the values mean.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Error, NonFiniteFloatPolicy, options, with_deserializer_from_str_with_options};

/// Bytes that a text may hold once its aliases are written out: far more than any job file means, and little memory.
const MAX_EXPANDED_BYTES: usize = 16 << 20;
/// What each value counts besides its text.
const BYTES_PER_VALUE: usize = 64;
/// The cause that the bound above is told by.
const TOO_MUCH: &str = "its aliases stand for more than 16 MiB; write less";

/// The parser's own bounds.
const TOO_DEEP: &str = "it is nested too deeply or holds too many values; write less";
/// How the parser tells of them where it has no kind of its own for that.
const TOO_DEEP_SAID: [&str; 2] = ["recursion limit", "budget breached"];

/// A value. Numbers and truth values keep their text: what it means is decided where flags are read, too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    /// Nothing, `null` or `~`.
    Null,
    /// A number or truth value.
    Plain(String),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Value>),
    /// A mapping, in the order of the text.
    Map(Vec<(String, Value)>),
}

impl Value {
    /// What it is, for messages.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Plain(_) => "a number or truth value",
            Self::Text(_) => "text",
            Self::List(_) => "a list",
            Self::Map(_) => "a mapping",
        }
    }
}

/// The one document of a text.
///
/// # Errors
/// Where it is wrong, how, and what to do about it.
pub(crate) fn parse(text: &str) -> Result<Value, String> {
    let options = options! {
        with_snippet: false,
        // `.inf` and 1e999 are told as what they are, by the field that they are given to.
        non_finite_float_policy: NonFiniteFloatPolicy::AsString,
    };
    let left = Cell::new(MAX_EXPANDED_BYTES);
    with_deserializer_from_str_with_options(text, options, |de| Node(&left).deserialize(de))
        .map_err(|error| told(&error))
}

fn told(error: &Error) -> String {
    let error = error.without_snippet();
    let problem = match error {
        Error::DuplicateMappingKey { key: Some(key), .. } => {
            format!("{key} is given more than once; leave all but one out")
        }
        Error::DuplicateMappingKey { key: None, .. } => {
            "a key is given more than once; leave all but one out".to_owned()
        }
        Error::MultipleDocuments { .. } => {
            "there is more than one document; write one job into one file".to_owned()
        }
        Error::RecursiveReferencesRequireWeakTypes { .. } => {
            "an alias stands for itself; write out what it should be".to_owned()
        }
        Error::AliasReplayLimitExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayCounterOverflow { .. }
        | Error::AliasReplayStackDepthExceeded { .. }
        | Error::Budget { .. } => TOO_DEEP.to_owned(),
        other => plain(&other.to_string()),
    };
    match error.location() {
        Some(at) if at.line() > 0 => {
            format!("line {}, column {}: {problem}", at.line(), at.column())
        }
        _ => problem,
    }
}

/// The parser's own words without the place, which is told in front of them.
fn plain(text: &str) -> String {
    let text = text.lines().next().unwrap_or(text);
    let text = text.strip_prefix("error: ").unwrap_or(text);
    if TOO_DEEP_SAID.iter().any(|said| text.contains(said)) {
        return TOO_DEEP.to_owned();
    }
    let text = match text
        .strip_prefix("line ")
        .and_then(|rest| rest.split_once(": "))
    {
        Some((_, rest)) => rest,
        None => text,
    };
    // Where an alias is defined and used, and again where it is.
    let end = [" (defined at line ", " at line "]
        .iter()
        .filter_map(|mark| text.find(mark))
        .min();
    text[..end.unwrap_or(text.len())].to_owned()
}

/// Reads one value and takes what it needs from the bytes that are left.
#[derive(Clone, Copy)]
struct Node<'a>(&'a Cell<usize>);

impl Node<'_> {
    fn take<E: serde::de::Error>(self, bytes: usize) -> Result<(), E> {
        let needed = bytes.saturating_add(BYTES_PER_VALUE);
        let left = self.0.get().checked_sub(needed);
        self.0.set(left.ok_or_else(|| E::custom(TOO_MUCH))?);
        Ok(())
    }

    fn plain<E: serde::de::Error>(self, value: impl ToString) -> Result<Value, E> {
        self.take(0)?;
        Ok(Value::Plain(value.to_string()))
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text, a number, a list or a mapping")
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Value, E> {
        self.take(0)?;
        Ok(Value::Null)
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<Value, E> {
        self.visit_unit()
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Value, E> {
        self.plain(value)
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Value, E> {
        self.plain(value)
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Value, E> {
        self.plain(value)
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        self.plain(value)
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Value, E> {
        self.take(value.len())?;
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        self.take(0)?;
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        self.take(0)?;
        let mut map = Vec::new();
        while let Some(key) = entries.next_key_seed(self)? {
            let key = match key {
                Value::Plain(text) | Value::Text(text) => text,
                other => {
                    let kind = other.kind();
                    return Err(A::Error::custom(format!("a key is {kind}; write a name")));
                }
            };
            map.push((key, entries.next_value_seed(self)?));
        }
        Ok(Value::Map(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_keep_their_text() {
        let text = |text: &str| Value::Text(text.to_owned());
        let plain = |text: &str| Value::Plain(text.to_owned());
        let entry = |key: &str, value| (key.to_owned(), value);
        assert_eq!(
            parse("a: 2\nb: 0.5\nc: true\nd: x\ne: \"2\"\nf: ~\ng: [1, x]\nh: .inf\n1: 1e999\n"),
            Ok(Value::Map(vec![
                entry("a", plain("2")),
                entry("b", plain("0.5")),
                entry("c", plain("true")),
                entry("d", text("x")),
                entry("e", text("2")),
                entry("f", Value::Null),
                entry("g", Value::List(vec![plain("1"), text("x")])),
                entry("h", text(".inf")),
                entry("1", text(".inf")),
            ]))
        );
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place_and_without_the_parsers_jargon() {
        for (text, message) in [
            (
                "a: 1\na: 2\n",
                "line 2, column 1: a is given more than once; leave all but one out",
            ),
            (
                "a: 1\n---\nb: 2\n",
                "line 3, column 1: there is more than one document; write one job into one file",
            ),
            (
                "a: &x\n  b: *x\n",
                "line 2, column 6: an alias stands for itself; write out what it should be",
            ),
            ("name: \"x", "line 1, column 7: unclosed quote"),
        ] {
            assert_eq!(parse(text).unwrap_err(), message, "{text:?}");
        }
        let deep = format!("a: {}{}", "[".repeat(10_000), "]".repeat(10_000));
        let told = parse(&deep).unwrap_err();
        assert!(told.ends_with(TOO_DEEP), "{told}");
    }

    #[test]
    fn aliases_cannot_stand_for_more_than_memory() {
        let wide = format!(
            "a:\n- &x \"{}\"\n{}",
            "x".repeat(1 << 20),
            "- *x\n".repeat(10_000)
        );
        let told = parse(&wide).unwrap_err();
        assert!(told.ends_with(TOO_MUCH), "{told}");
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..10 {
            let before = format!("*a{}, ", level - 1).repeat(9);
            bomb.push_str(&format!("a{level}: &a{level} [{before}]\n"));
        }
        let told = parse(&bomb).unwrap_err();
        assert!(
            told.ends_with(TOO_DEEP) || told.ends_with(TOO_MUCH),
            "{told}"
        );
    }
}
