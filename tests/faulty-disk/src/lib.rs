//! A disk that fails on request: preloaded into a program (`LD_PRELOAD`), it stands before the calls that write and sync,
//! and lets those that a control file names fail, or ends the program there. It knows nothing of Trainyard.
//!
//! The variable [`CONTROL_ENV`] names the control file, which may be written and changed at any time. A line of it:
//!
//! ```text
//! <what> <calls> <skip> <count> <prefix>
//! EIO fsync 0 1 /tmp/x/state         the first sync of a file below this prefix fails, later ones do not
//! ENOSPC write,sync 2 * /tmp/x       after two calls all fail
//! KILL any 7 1 /tmp/x                the program is killed in place of the eighth call
//! ```
//!
//! `<what>` is `EIO`, `ENOSPC`, `EDQUOT` or `KILL`; `<calls>` are `write` (write, pwrite, fallocate, ftruncate), `fsync` or
//! `sync` (fsync, fdatasync), or `any`. Each line counts its calls for itself and begins anew when the file's text changes.
#![expect(
    unsafe_code,
    reason = "it takes the place of functions of the C library, whose interface is unsafe"
)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// Environment variable that names the control file; without it nothing fails.
pub const CONTROL_ENV: &str = "FAULTY_DISK";

const EIO: c_int = 5;
const ENOSPC: c_int = 28;
const EDQUOT: c_int = 122;
const SIGKILL: c_int = 9;
/// `RTLD_NEXT`: the function that this library hides.
const NEXT: *mut c_void = -1_isize as *mut c_void;

unsafe extern "C" {
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    fn __errno_location() -> *mut c_int;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn getpid() -> c_int;
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Write,
    Sync,
}

/// The control file's text, and how many calls each of its lines has met.
static SEEN: Mutex<(String, Vec<u64>)> = Mutex::new((String::new(), Vec::new()));

/// What is to become of a call on a file: nothing, or the number of an error.
fn verdict(call: Call, fd: c_int) -> Option<c_int> {
    let control = std::env::var_os(CONTROL_ENV)?;
    let text = fs::read_to_string(control).ok()?;
    if text.trim().is_empty() {
        return None;
    }
    let path = fs::read_link(PathBuf::from(format!("/proc/self/fd/{fd}"))).ok()?;
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    if seen.0 != text {
        *seen = (text.clone(), vec![0; text.lines().count()]);
    }
    for (line, met) in text.lines().zip(&mut seen.1) {
        let mut words = line.split_whitespace();
        let (Some(what), Some(calls), Some(skip), Some(count), Some(prefix)) = (
            words.next(),
            words.next(),
            words.next(),
            words.next(),
            words.next(),
        ) else {
            continue;
        };
        let meant = calls.split(',').any(|name| match name {
            "any" => true,
            "write" => call == Call::Write,
            "sync" | "fsync" => call == Call::Sync,
            _ => false,
        });
        if !meant || !path.to_string_lossy().starts_with(prefix) {
            continue;
        }
        let number = *met;
        *met += 1;
        let skip: u64 = skip.parse().unwrap_or(0);
        let count: u64 = count.parse().unwrap_or(u64::MAX);
        if number < skip || number - skip >= count {
            continue;
        }
        match what {
            "EIO" => return Some(EIO),
            "ENOSPC" => return Some(ENOSPC),
            "EDQUOT" => return Some(EDQUOT),
            // SAFETY: both take and give integers only; the process ends.
            "KILL" => unsafe { kill(getpid(), SIGKILL) },
            _ => continue,
        };
    }
    None
}

/// Sets `errno` and gives what a failed call gives.
fn fail(error: c_int) -> isize {
    // SAFETY: the C library gives the address of this thread's own `errno`, which is valid as long as the thread lives.
    unsafe { *__errno_location() = error };
    -1
}

/// The function of this name that this library hides.
fn hidden(name: &CStr) -> *mut c_void {
    // SAFETY: the name is a C string, and `RTLD_NEXT` is a valid handle.
    let found = unsafe { dlsym(NEXT, name.as_ptr()) };
    assert!(!found.is_null(), "the C library has the function");
    found
}

macro_rules! stand_before {
    ($name:ident, $symbol:literal, $call:expr, ($($argument:ident: $type:ty),*) -> $result:ty) => {
        #[doc = concat!("Stands before `", stringify!($name), "` of the C library, with its interface.")]
        ///
        /// # Safety
        /// That of the function.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(fd: c_int, $($argument: $type),*) -> $result {
            if let Some(error) = verdict($call, fd) {
                return fail(error) as $result;
            }
            // SAFETY: the function of this name has this interface, and the arguments are the caller's.
            unsafe {
                let call: unsafe extern "C" fn(c_int, $($type),*) -> $result = std::mem::transmute(hidden($symbol));
                call(fd, $($argument),*)
            }
        }
    };
}

stand_before!(write, c"write", Call::Write, (bytes: *const c_void, count: usize) -> isize);
stand_before!(pwrite, c"pwrite", Call::Write, (bytes: *const c_void, count: usize, at: i64) -> isize);
stand_before!(pwrite64, c"pwrite64", Call::Write, (bytes: *const c_void, count: usize, at: i64) -> isize);
stand_before!(ftruncate, c"ftruncate", Call::Write, (size: i64) -> c_int);
stand_before!(ftruncate64, c"ftruncate64", Call::Write, (size: i64) -> c_int);
stand_before!(fallocate, c"fallocate", Call::Write, (mode: c_int, at: i64, size: i64) -> c_int);
stand_before!(fallocate64, c"fallocate64", Call::Write, (mode: c_int, at: i64, size: i64) -> c_int);
stand_before!(fsync, c"fsync", Call::Sync, () -> c_int);
stand_before!(fdatasync, c"fdatasync", Call::Sync, () -> c_int);
