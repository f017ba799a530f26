//! Keeps a shim small while its ranks work. Pages of the program that only its start needed are given back; the kernel
//! reads those that are needed again from the file, which it has in memory as long as anybody uses the same program.

use std::ffi::c_void;
use std::ptr::NonNull;

use nix::libc;
use nix::sys::mman::{MmapAdvise, madvise};

/// Gives back what was read of the program and its libraries. What was written to stays.
pub(crate) fn give_back_program() {
    let Ok(maps) = std::fs::read_to_string("/proc/self/smaps") else {
        return;
    };
    for (start, length) in unwritten(&maps) {
        give_back(start, length);
    }
}

/// Gives back what the heap holds and does not use, in the arenas of all threads: the C library keeps it for the next
/// time, which may be tomorrow.
#[cfg_attr(
    target_env = "gnu",
    expect(unsafe_code, reason = "a function of the C library")
)]
pub(crate) fn give_back_heap() {
    // SAFETY: it may be called at any time by any thread.
    #[cfg(target_env = "gnu")]
    let _ = unsafe { libc::malloc_trim(0) };
}

#[expect(
    unsafe_code,
    reason = "the library's wrapper cannot know what lies there"
)]
fn give_back(start: usize, length: usize) {
    let Some(start) = NonNull::new(start as *mut c_void) else {
        return;
    };
    // SAFETY: the mapping is of a file, cannot be written to and holds no page of our own, so each page reads the same
    // before and after.
    let _ = unsafe { madvise(start, length as libc::size_t, MmapAdvise::MADV_DONTNEED) };
}

/// Start and length of all mappings of files that nobody may write to and nobody ever has.
fn unwritten(maps: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut candidate = None;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (first, second) = (words.next().unwrap_or_default(), words.next());
        match (range(first), second) {
            (Some(range), Some(mode)) => {
                let of_file = words.nth(3).is_some_and(|path| path.starts_with('/'));
                candidate = (of_file && mode.starts_with("r-")).then_some(range);
            }
            // How much of it is not the file's: what was written to before it became read-only, as relocations are.
            (None, Some("0")) if first == "Anonymous:" => found.extend(candidate.take()),
            (None, Some(_)) if first == "Anonymous:" => candidate = None,
            _ => {}
        }
    }
    found
}

fn range(text: &str) -> Option<(usize, usize)> {
    let (start, end) = text.split_once('-')?;
    let start = usize::from_str_radix(start, 16).ok()?;
    let end = usize::from_str_radix(end, 16).ok()?;
    Some((start, end.checked_sub(start)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
1000-3000 r--p 00000000 fe:00 12 /usr/bin/yard
Rss:                   8 kB
Anonymous:             0 kB
3000-9000 r-xp 00002000 fe:00 12 /usr/bin/yard (deleted)
Anonymous:             0 kB
9000-a000 r--p 00008000 fe:00 12 /usr/bin/yard
Anonymous:             4 kB
a000-b000 rw-p 00009000 fe:00 12 /usr/bin/yard
Anonymous:             0 kB
b000-c000 r--p 00000000 00:00 0
Anonymous:             0 kB
c000-d000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
";

    #[test]
    fn only_pages_that_read_the_same_from_the_file_are_given_back() {
        assert_eq!(unwritten(MAPS), [(0x1000, 0x2000), (0x3000, 0x6000)]);
        assert_eq!(unwritten("1-x r-xp 0 0 0 /a\nAnonymous: 0 kB"), []);
    }

    #[test]
    fn the_program_goes_on_without_them() {
        let maps = || std::fs::read_to_string("/proc/self/smaps").unwrap();
        assert!(!unwritten(&maps()).is_empty());
        give_back_program();
        assert!(!unwritten(&maps()).is_empty());
    }
}
