//! What one loaded copy of the library remembers: how often it was initialised, the scenario it read last, and its
//! event sets. It owns finding and reading the scenario file; it knows nothing of the single functions of NVML.
#![expect(
    unsafe_code,
    reason = "only the dynamic loader knows the file that this library was loaded from"
)]

use std::collections::BTreeMap;
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::abi::{Code, DeviceHandle, SetHandle};
use crate::parse::parse;
use crate::scenario::{Gpu, Machine};
use crate::{MAX_SCENARIO_BYTES, SCENARIO_ENV, scenario_path};

/// Most event sets at a time; a program needs one.
const MAX_SETS: usize = 1024;

/// One loaded copy. Statics of two copies of a shared library are two variables, hence nothing here is shared by them.
static LIBRARY: Mutex<Library> = Mutex::new(Library::new());

/// The state of one copy.
#[derive(Debug)]
pub(crate) struct Library {
    initialised: u32,
    /// The text of the last good scenario.
    text: Option<String>,
    /// What was last said about a bad one.
    complaint: String,
    machine: Machine,
    sets: BTreeMap<u32, EventSet>,
    next_set: u32,
}

/// Which GPUs an event set listens to, and what it has delivered.
#[derive(Debug, Default)]
pub(crate) struct EventSet {
    /// Event types by index of the GPU.
    pub(crate) types: BTreeMap<u32, u64>,
    /// How many of the scenario's critical errors are behind this set.
    pub(crate) seen: usize,
}

impl Library {
    const fn new() -> Library {
        Library {
            initialised: 0,
            text: None,
            complaint: String::new(),
            machine: Machine::empty(),
            sets: BTreeMap::new(),
            next_set: 1,
        }
    }

    /// Counts one more user, if the scenario lets the driver start.
    pub(crate) fn initialise(&mut self) -> Result<(), Code> {
        self.refresh();
        if self.text.is_none() {
            return Err(Code::DRIVER_NOT_LOADED);
        }
        if let Some(code) = self.machine.init_error {
            return Err(code);
        }
        self.initialised = self.initialised.saturating_add(1);
        Ok(())
    }

    /// Counts one user less; the last one takes the event sets away.
    pub(crate) fn shut_down(&mut self) -> Result<(), Code> {
        self.initialised = self.initialised.checked_sub(1).ok_or(Code::UNINITIALIZED)?;
        if self.initialised == 0 {
            self.sets.clear();
        }
        Ok(())
    }

    /// The machine as the scenario describes it now.
    pub(crate) fn machine(&mut self) -> Result<&Machine, Code> {
        if self.initialised == 0 {
            return Err(Code::UNINITIALIZED);
        }
        self.refresh();
        Ok(&self.machine)
    }

    /// Version of the NVML library, which is told without initialisation.
    pub(crate) fn nvml_version(&mut self) -> &str {
        self.refresh();
        &self.machine.nvml
    }

    /// Adds an event set.
    pub(crate) fn create_set(&mut self) -> Result<SetHandle, Code> {
        self.machine()?;
        if self.sets.len() >= MAX_SETS {
            return Err(Code::UNKNOWN);
        }
        let number = self.next_set;
        self.next_set = self.next_set.wrapping_add(1);
        let seen = self.machine.xids.len();
        self.sets.insert(
            number,
            EventSet {
                types: BTreeMap::new(),
                seen,
            },
        );
        Ok(SetHandle::of(number))
    }

    /// Takes an event set away.
    pub(crate) fn free_set(&mut self, handle: SetHandle) -> Result<(), Code> {
        self.machine()?;
        let removed = handle.number().and_then(|number| self.sets.remove(&number));
        removed.map(|_| ()).ok_or(Code::INVALID_ARGUMENT)
    }

    /// The machine and one event set.
    pub(crate) fn set(&mut self, handle: SetHandle) -> Result<(&Machine, &mut EventSet), Code> {
        self.machine()?;
        let set = handle
            .number()
            .and_then(|number| self.sets.get_mut(&number));
        Ok((&self.machine, set.ok_or(Code::INVALID_ARGUMENT)?))
    }

    /// Reads the scenario again if it changed. A scenario that is missing or wrong leaves the last good one in place: a
    /// test that damages its file by mistake then sees the complaint and not a machine that lost its GPUs.
    fn refresh(&mut self) {
        let path = scenario_file();
        let text = match read_bounded(&path) {
            Ok(text) => text,
            Err(error) => return self.complain(&path, &error),
        };
        if self.text.as_deref() == Some(text.as_str()) {
            return;
        }
        match parse(&text) {
            Ok(machine) => {
                self.machine = machine;
                self.text = Some(text);
                self.complaint.clear();
            }
            Err(error) => self.complain(&path, &error),
        }
    }

    /// Says on standard error, once, what is wrong with the scenario: NVML's codes cannot.
    #[expect(
        clippy::print_stderr,
        reason = "a C library has no other way to say which line of its file is wrong"
    )]
    fn complain(&mut self, path: &Path, error: &dyn std::error::Error) {
        let complaint = format!("fake NVML: {}: {error}", path.display());
        if complaint != self.complaint {
            eprintln!("{complaint}");
            self.complaint = complaint;
        }
    }
}

/// Reads a file of at most [`MAX_SCENARIO_BYTES`].
fn read_bounded(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(MAX_SCENARIO_BYTES + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > MAX_SCENARIO_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("a scenario has at most {MAX_SCENARIO_BYTES} bytes"),
        ));
    }
    Ok(text)
}

/// The scenario file of this copy.
fn scenario_file() -> PathBuf {
    match std::env::var_os(SCENARIO_ENV) {
        Some(path) if !path.is_empty() => PathBuf::from(path),
        _ => scenario_path(&own_path()),
    }
}

/// `Dl_info` of `<dlfcn.h>`.
#[repr(C)]
struct DlInfo {
    file_name: *const c_char,
    base: *mut c_void,
    symbol_name: *const c_char,
    symbol: *mut c_void,
}

// SAFETY: the declaration of `<dlfcn.h>` on Linux; glibc and musl define the function in the C library, which the Rust
// standard library links in any case.
unsafe extern "C" {
    fn dladdr(address: *const c_void, info: *mut DlInfo) -> c_int;
}

/// The file that this copy of the library was loaded from.
fn own_path() -> PathBuf {
    let mut info = DlInfo {
        file_name: std::ptr::null(),
        base: std::ptr::null_mut(),
        symbol_name: std::ptr::null(),
        symbol: std::ptr::null_mut(),
    };
    let own: fn() -> PathBuf = own_path;
    // SAFETY: `info` is valid for the call, and any address may be asked about.
    let found = unsafe { dladdr(own as *const c_void, &raw mut info) };
    if found == 0 || info.file_name.is_null() {
        return PathBuf::new();
    }
    // SAFETY: the loader's own zero-terminated string, which stays as long as this library is loaded; it is copied here.
    let name = unsafe { CStr::from_ptr(info.file_name) };
    PathBuf::from(OsStr::from_bytes(name.to_bytes()))
}

/// Runs the body of an exported function: with this copy's state, and with a panic turned into `NVML_ERROR_UNKNOWN`,
/// because unwinding into a C caller is not defined.
pub(crate) fn guarded(body: impl FnOnce() -> Result<(), Code>) -> Code {
    catch_unwind(AssertUnwindSafe(body))
        .unwrap_or(Err(Code::UNKNOWN))
        .into()
}

/// This copy's state. A panic while it was held cannot have left it half changed in a way that matters: it is read anew
/// from the file on each call.
pub(crate) fn library() -> MutexGuard<'static, Library> {
    LIBRARY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the body of the function `name`, which asks something of the machine.
pub(crate) fn on_machine(name: &str, body: impl FnOnce(&Machine) -> Result<(), Code>) -> Code {
    guarded(|| {
        let mut library = library();
        let machine = library.machine()?;
        match machine.failures.get(name) {
            Some(code) => Err(*code),
            None => body(machine),
        }
    })
}

/// Runs the body of the function `name` for a GPU that is there and may answer.
pub(crate) fn on_gpu(
    name: &str,
    device: DeviceHandle,
    body: impl FnOnce(&Machine, &Gpu) -> Result<(), Code>,
) -> Code {
    on_machine(name, |machine| {
        let gpu = gpu_of(machine, device)?;
        gpu.answers(name)?;
        body(machine, gpu)
    })
}

/// The GPU that a handle stands for.
pub(crate) fn gpu_of(machine: &Machine, device: DeviceHandle) -> Result<&Gpu, Code> {
    let gpu = device
        .index()
        .and_then(|index| machine.gpus.get(index as usize));
    gpu.ok_or(Code::INVALID_ARGUMENT)
}
