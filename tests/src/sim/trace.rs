//! What happened: the last lines for people, a hash over everything for the test that two runs of one seed are the same,
//! and counters that show which faults and branches were reached.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;

use super::clock::Micros;

/// Lines kept for a failing seed.
const KEPT: usize = 120;

#[derive(Debug, Default)]
pub(crate) struct Trace {
    hash: u64,
    lines: VecDeque<String>,
    pub(crate) counters: BTreeMap<&'static str, u64>,
    /// Whether every line is kept.
    pub(crate) whole: bool,
}

/// Takes text into the hash without keeping it.
struct Feed<'a>(&'a mut u64);

impl Write for Feed<'_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        mix_bytes(self.0, text.as_bytes());
        Ok(())
    }
}

fn mix(hash: &mut u64, word: u64) {
    *hash = (hash.rotate_left(5) ^ word).wrapping_mul(0x517C_C1B7_2722_0A95);
}

fn mix_bytes(hash: &mut u64, bytes: &[u8]) {
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        let mut word = [0; 8];
        word.copy_from_slice(chunk);
        mix(hash, u64::from_le_bytes(word));
    }
    for byte in chunks.remainder() {
        mix(hash, u64::from(*byte) | 0x100);
    }
}

impl Trace {
    pub(crate) fn line(&mut self, now: Micros, text: String) {
        mix(&mut self.hash, now);
        mix_bytes(&mut self.hash, text.as_bytes());
        if self.lines.len() >= KEPT && !self.whole {
            self.lines.pop_front();
        }
        let (seconds, millis) = (now / 1_000_000, now / 1000 % 1000);
        self.lines
            .push_back(format!("{seconds:>6}.{millis:03} {text}"));
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        mix_bytes(&mut self.hash, bytes);
    }

    pub(crate) fn debug(&mut self, what: &dyn std::fmt::Debug) {
        // Writing into a hash cannot fail.
        let _ = write!(Feed(&mut self.hash), "{what:?}");
    }

    pub(crate) fn see(&mut self, what: &'static str) {
        *self.counters.entry(what).or_default() += 1;
    }

    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    pub(crate) fn tail(&self) -> Vec<String> {
        self.lines.iter().cloned().collect()
    }
}
