//! The one form of the small JSON files that programs of ours write and read again: a first line with the kind of
//! record, its format version and a checksum, and then the record itself.
//!
//! ```text
//! {"trainyard":"member 2 crc32=0badc0de",
//! "attempt":"j17.0.1", ...}
//! ```
//!
//! The whole file is still one JSON object, so programs from before this form read it too. Their own files, without the
//! first line, count as version 1 and are read as they are. It knows nothing of what the records mean.

use std::fmt;
use std::io;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// How every sealed file begins.
const BEGINNING: &[u8] = b"{\"trainyard\":\"";
/// Before the checksum.
const CHECKSUM: &str = " crc32=";
/// The longest first line that is one.
const MAX_HEADER: usize = 96;

/// A record that is kept in a file.
pub trait FileRecord: Serialize + DeserializeOwned {
    /// What it is called in the first line: lower case letters.
    const KIND: &'static str;
    /// The format's version, at least 2: 1 is what was written before there was a first line. It grows when a program
    /// that does not know a field would do something wrong.
    const VERSION: u32;
}

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("record unreadable at byte {offset}: {problem}")]
pub struct Damage {
    /// Where, in bytes from its start; where that cannot be told, the start of what the checksum is of.
    pub offset: u64,
    /// What.
    pub problem: String,
}

impl Damage {
    fn new(offset: usize, problem: impl fmt::Display) -> Self {
        let problem = problem.to_string();
        Self {
            offset: offset as u64,
            problem,
        }
    }

    /// The same as an error of reading this file, which names it.
    #[must_use]
    pub fn of(&self, path: &Path) -> io::Error {
        let message = format!("{}: {self}", path.display());
        io::Error::new(io::ErrorKind::InvalidData, message)
    }
}

/// The bytes of a file for this record.
///
/// # Errors
/// The record is no JSON object, or cannot be one.
pub fn seal<T: FileRecord>(record: &T) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(record)?;
    let Some(rest) = json.strip_prefix(b"{") else {
        let message = format!("a {} is not a JSON object", T::KIND);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    };
    let crc = checksum(T::KIND, T::VERSION, rest);
    let mut bytes = BEGINNING.to_vec();
    bytes.extend(format!("{} {}{CHECKSUM}{crc:08x}\"", T::KIND, T::VERSION).bytes());
    if rest != b"}" {
        bytes.push(b',');
    }
    bytes.push(b'\n');
    bytes.extend_from_slice(rest);
    Ok(bytes)
}

/// The record in a file.
///
/// # Errors
/// [`Damage`]: it is not whole, or something else, or of a version that is not known here.
pub fn open<T: FileRecord>(bytes: &[u8]) -> Result<T, Damage> {
    let first = bytes.split(|byte| *byte == b'\n').next();
    let header = first.unwrap_or_default();
    match header.strip_prefix(BEGINNING) {
        Some(seal) => check::<T>(seal, header.len() + 1, bytes)?,
        // Not one of before either: those have no checksum.
        None if is_like_header(header) => {
            return Err(Damage::new(0, "its first line is damaged"));
        }
        None => {}
    }
    serde_json::from_slice(bytes).map_err(|error| Damage::new(place(bytes, &error), error))
}

fn is_like_header(line: &[u8]) -> bool {
    let start = &line[..line.len().min(MAX_HEADER)];
    let has = |text: &[u8]| start.windows(text.len()).any(|window| window == text);
    has(CHECKSUM.as_bytes()) || has(b"{\"trainyard\"")
}

/// `seal` is the first line without what all begin with.
fn check<T: FileRecord>(seal: &[u8], body: usize, bytes: &[u8]) -> Result<(), Damage> {
    let damaged = || Damage::new(0, "its first line is damaged");
    let seal = std::str::from_utf8(seal).map_err(|_| damaged())?;
    let seal = seal.strip_suffix(',').unwrap_or(seal);
    let seal = seal.strip_suffix('"').ok_or_else(damaged)?;
    let (what, crc) = seal.split_once(CHECKSUM).ok_or_else(damaged)?;
    let (kind, version) = what.split_once(' ').ok_or_else(damaged)?;
    let version: u32 = version.parse().map_err(|_| damaged())?;
    let crc = (crc.len() == 8)
        .then(|| u32::from_str_radix(crc, 16).ok())
        .flatten()
        .ok_or_else(damaged)?;
    let rest = bytes.get(body..).unwrap_or_default();
    if crc != checksum(kind, version, rest) {
        let problem = format!(
            "its {} bytes do not have the checksum that they should",
            rest.len()
        );
        return Err(Damage::new(body.min(bytes.len()), problem));
    }
    if kind != T::KIND {
        let problem = format!("it is a record of a {kind}, not of a {}", T::KIND);
        return Err(Damage::new(0, problem));
    }
    if version > T::VERSION {
        let problem = format!(
            "it is a {kind} of format version {version}, and this program reads up to {}: upgrade it",
            T::VERSION
        );
        return Err(Damage::new(0, problem));
    }
    Ok(())
}

fn checksum(kind: &str, version: u32, rest: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(format!("{kind} {version}\n").as_bytes());
    hasher.update(rest);
    hasher.finalize()
}

/// Where in the bytes an error is.
fn place(bytes: &[u8], error: &serde_json::Error) -> usize {
    let lines = bytes.split_inclusive(|byte| *byte == b'\n');
    let before: usize = lines
        .take(error.line().saturating_sub(1))
        .map(<[u8]>::len)
        .sum();
    (before + error.column().saturating_sub(1)).min(bytes.len())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
    struct Thing {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    }

    impl FileRecord for Thing {
        const KIND: &'static str = "thing";
        const VERSION: u32 = 3;
    }

    fn named(name: &str) -> Thing {
        let name = Some(name.to_owned());
        Thing { name }
    }

    #[test]
    fn what_is_sealed_is_opened_and_is_still_json() {
        for thing in [named("a\nb\""), Thing { name: None }] {
            let bytes = seal(&thing).unwrap();
            assert!(bytes.starts_with(b"{\"trainyard\":\"thing 3 crc32="));
            assert_eq!(open::<Thing>(&bytes).unwrap(), thing);
            let plain: Thing = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(plain, thing);
        }
        assert_eq!(open::<Thing>(b"{\"name\":\"old\"}").unwrap(), named("old"));
    }

    #[test]
    fn every_flip_and_every_cut_is_seen() {
        let thing = named("one");
        let bytes = seal(&thing).unwrap();
        for cut in 0..bytes.len() {
            open::<Thing>(&bytes[..cut]).unwrap_err();
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            // A hexadecimal digit may be of either case.
            if let Ok(read) = open::<Thing>(&flipped) {
                assert_eq!(read, thing, "bit {bit}");
                assert!(flipped.eq_ignore_ascii_case(&bytes), "bit {bit}");
            }
        }
    }

    #[test]
    fn what_is_not_known_is_refused_with_a_reason() {
        let with = |kind: &str, version: u32| {
            let crc = checksum(kind, version, b"}");
            let text = format!("{{\"trainyard\":\"{kind} {version} crc32={crc:08x}\"\n}}");
            open::<Thing>(text.as_bytes())
        };
        assert_eq!(with("thing", 2).unwrap(), Thing { name: None });
        let newer = with("thing", 4).unwrap_err().to_string();
        assert!(
            newer.contains("version 4") && newer.contains("upgrade"),
            "{newer}"
        );
        let other = with("member", 3).unwrap_err().to_string();
        assert!(other.contains("not of a thing"), "{other}");
        let torn = open::<Thing>(b"{\"name\":\n\"o").unwrap_err();
        assert!(torn.offset >= 9, "{torn}");
        let named = torn.of(Path::new("/a/b")).to_string();
        assert!(
            named.starts_with("/a/b: record unreadable at byte "),
            "{named}"
        );
    }
}
