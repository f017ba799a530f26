//! A small text that is replaced in place: two slots in one file of fixed size, written in turns. Knows nothing of what
//! the text means.
//!
//! Replacing it takes no space, so it works on a full disk, unless the file system writes to a new place each time. A
//! slot that is torn by a crash or a failed write leaves the other, which is the text of before.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use trainyard_transport::files;

/// Bytes of a slot: a block of every usual file system, so that writing one never touches the other.
const SLOT_BYTES: usize = 4096;
/// Where the second slot lies.
const SLOT_OFFSET: u64 = SLOT_BYTES as u64;
/// Hexadecimal digits of the checksum at the start of a line.
const CRC_DIGITS: usize = 8;
/// The longest text: a slot less the checksum, the number with its two spaces, and the end of the line.
const MAX_TEXT_BYTES: usize = SLOT_BYTES - 64;

/// The file, open for writing.
#[derive(Debug)]
pub(super) struct Slots {
    file: File,
    /// The number of the newest text; its lowest bit tells its slot.
    newest: u64,
    /// Where a slot lies that was not whole when it was opened.
    damaged: Option<u64>,
}

impl Slots {
    /// Makes the file, replacing what is there in one step. It blocks.
    pub(super) fn create(path: &Path, text: &str) -> io::Result<Self> {
        let mut bytes = encode(0, text)?;
        bytes.extend(encode(1, text)?);
        files::write_private(path, &bytes)?;
        Ok(Self {
            file: OpenOptions::new().read(true).write(true).open(path)?,
            newest: 1,
            damaged: None,
        })
    }

    /// Opens the file with its newest text; nothing if it is none of these files, or both slots are damaged. It blocks.
    pub(super) fn open(path: &Path) -> io::Result<Option<(Self, String)>> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        if file.metadata()?.len() != 2 * SLOT_OFFSET {
            return Ok(None);
        }
        let mut bytes = [0; 2 * SLOT_BYTES];
        file.read_exact_at(&mut bytes, 0)?;
        let (first, second) = bytes.split_at(SLOT_BYTES);
        let slots = [first, second].map(decode);
        let place = slots.iter().position(Option::is_none);
        let damaged = place.map(|place| place as u64 * SLOT_OFFSET);
        let newest = slots.into_iter().flatten();
        let newest = newest.max_by_key(|(number, _)| *number);
        Ok(newest.map(|(newest, text)| {
            let slots = Self {
                file,
                newest,
                damaged,
            };
            (slots, text)
        }))
    }

    /// Where the slot lies that was not whole when the file was opened, if one was not: torn, or damaged since.
    pub(super) fn damaged(&self) -> Option<u64> {
        self.damaged
    }

    /// Replaces the text; it is on disk then. After a failure the old one is still there. It blocks.
    pub(super) fn write(&mut self, text: &str) -> io::Result<()> {
        let number = self.newest + 1;
        let bytes = encode(number, text)?;
        self.file.write_all_at(&bytes, number % 2 * SLOT_OFFSET)?;
        self.file.sync_data()?;
        self.newest = number;
        Ok(())
    }

    /// Puts a file in the place of the real one, to see what its failures do; the real one is given back.
    #[cfg(test)]
    pub(super) fn replace_file(&mut self, file: File) -> File {
        std::mem::replace(&mut self.file, file)
    }
}

/// A whole slot: checksum, number and text in a line, and spaces up to its end.
fn encode(number: u64, text: &str) -> io::Result<Vec<u8>> {
    if text.len() > MAX_TEXT_BYTES || text.contains('\n') {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let line = format!("{number} {text}");
    let crc = crc32fast::hash(line.as_bytes());
    let mut bytes = format!("{crc:08x} {line}\n").into_bytes();
    bytes.resize(SLOT_BYTES - 1, b' ');
    bytes.push(b'\n');
    Ok(bytes)
}

/// The number and the text of a slot that is whole.
fn decode(slot: &[u8]) -> Option<(u64, String)> {
    let line = slot.split(|byte| *byte == b'\n').next()?;
    let (crc, line) = std::str::from_utf8(line)
        .ok()?
        .split_at_checked(CRC_DIGITS)?;
    let line = line.strip_prefix(' ')?;
    let crc = u32::from_str_radix(crc, 16).ok()?;
    (crc == crc32fast::hash(line.as_bytes())).then_some(())?;
    let (number, text) = line.split_once(' ')?;
    Some((number.parse().ok()?, text.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn text(path: &Path) -> Option<String> {
        Slots::open(path).unwrap().map(|(_, text)| text)
    }

    #[test]
    fn writing_needs_no_space() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("file");
        let mut slots = Slots::create(&path, "zero").unwrap();
        let before = std::fs::metadata(&path).unwrap();
        for number in 0..5 {
            slots.write(&format!("text {number}")).unwrap();
            assert_eq!(text(&path).unwrap(), format!("text {number}"));
        }
        let after = std::fs::metadata(&path).unwrap();
        assert_eq!(before.ino(), after.ino());
        assert_eq!(
            (before.len(), before.blocks()),
            (after.len(), after.blocks())
        );
    }

    #[test]
    fn a_torn_slot_leaves_the_text_of_before() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("file");
        let mut slots = Slots::create(&path, "zero").unwrap();
        for number in 1..=4_u64 {
            let before = text(&path).unwrap();
            slots.write(&format!("text {number}")).unwrap();
            let place = slots.newest % 2 * SLOT_OFFSET;
            let mut whole = [0; SLOT_BYTES];
            slots.file.read_exact_at(&mut whole, place).unwrap();
            for written in [0, 1, 9, 12, 15] {
                let mut torn = [b'#'; SLOT_BYTES];
                torn[..written].copy_from_slice(&whole[..written]);
                slots.file.write_all_at(&torn, place).unwrap();
                assert_eq!(text(&path).unwrap(), before, "{written}");
            }
            slots.file.write_all_at(&whole, place).unwrap();
            assert_eq!(text(&path).unwrap(), format!("text {number}"));
        }
        slots.file.write_all_at(&[0; 2 * SLOT_BYTES], 0).unwrap();
        assert_eq!(text(&path), None);
    }

    #[test]
    fn what_does_not_fit_is_refused_and_other_files_are_not_taken() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("file");
        let mut slots = Slots::create(&path, "zero").unwrap();
        slots.write(&"x".repeat(MAX_TEXT_BYTES)).unwrap();
        assert_eq!(text(&path).unwrap().len(), MAX_TEXT_BYTES);
        slots.write(&"x".repeat(MAX_TEXT_BYTES + 1)).unwrap_err();
        slots.write("two\nlines").unwrap_err();
        assert_eq!(text(&path).unwrap().len(), MAX_TEXT_BYTES);
        std::fs::write(&path, "{}").unwrap();
        assert_eq!(text(&path), None);
    }
}
