//! How a rank is started: a child that is born in the attempt's cgroup, becomes an ordinary process with nothing of the
//! shim's, and then the rank's program. Knows nothing of what becomes of it.
//!
//! **Why not the standard library.** A process that moves itself into a cgroup waits for the whole machine: the kernel
//! must be sure that nobody forks meanwhile, about 11 ms each time. A child that is *made* in the cgroup
//! (`CLONE_INTO_CGROUP`, Linux 5.7) costs 0.2 ms, and only the raw system call can ask for it. So what happens between
//! that call and the program is written out here. The child is a copy of a process with threads of which only one goes
//! on: it must not allocate, take a lock, or call what does (the C library's changes of user among them). Everything it
//! needs is made before.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::null;

use nix::errno::Errno;
use nix::libc::{self, c_char, c_int};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, getpid, getppid, setpgid};

use super::launch::RankPlan;
use super::process::close_others;

/// Linux's signals are 1 to 64.
const LAST_SIGNAL: c_int = 64;
/// What the C library searches when there is no `PATH`.
const DEFAULT_PATH: &[u8] = b"/bin:/usr/bin";
/// The kernel's flag; the library defines it as a type that does not hold it on every system.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const SHELL: &CStr = c"/bin/sh";

/// The user that ranks run as, looked up before the fork.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) uid: libc::uid_t,
    pub(crate) gid: libc::gid_t,
    pub(crate) groups: Vec<libc::gid_t>,
}

/// What all ranks of a member have in common.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) work: std::path::PathBuf,
    /// The directory of the cgroup that they are born in.
    pub(crate) cgroup: Option<File>,
    pub(crate) identity: Option<Identity>,
}

/// Why a rank could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpawnError {
    /// The job's own fault.
    #[error("cannot execute {program:?}: {error}")]
    CannotExecute { program: String, error: Text },
    /// The machine's fault.
    #[error("the node could not start a process: {0}")]
    Machine(Text),
}

/// An error's text without the number that the standard library appends.
#[derive(Debug)]
pub(crate) struct Text(io::Error);

impl std::fmt::Display for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.raw_os_error() {
            Some(code) => f.write_str(Errno::from_raw(code).desc()),
            None => self.0.fmt(f),
        }
    }
}

/// A rank's process and the read ends of what it writes.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) pid: i32,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

/// Starts one rank. Must be called from a thread that lives as long as the shim: the rank is killed when it ends.
pub(crate) fn spawn(plan: &RankPlan, setup: &Setup) -> Result<Started, SpawnError> {
    let image = Image::new(plan)?;
    start(&image, setup).map_err(|failed| failed.explain(plan))
}

/// A search through a directory that may not be entered ends in "permission denied" although nothing was found.
fn searched(program: &str, plan: &RankPlan, errno: Errno) -> io::Error {
    let missing = errno == Errno::EACCES
        && !program.contains('/')
        && plan.env.get("PATH").is_some_and(|path| {
            !std::env::split_paths(path).any(|dir| dir.join(program).symlink_metadata().is_ok())
        });
    if missing { Errno::ENOENT } else { errno }.into()
}

/// Strings as `execve` takes them: pointers to each, and a null at the end.
struct Strings {
    pointers: Vec<*const c_char>,
    /// What they point to; a string's bytes stay where they are when this moves.
    _owned: Vec<CString>,
}

impl Strings {
    fn new(strings: impl IntoIterator<Item = Vec<u8>>) -> io::Result<Self> {
        let owned: Vec<CString> = strings
            .into_iter()
            .map(CString::new)
            .collect::<Result<_, _>>()?;
        let pointers = owned.iter().map(|string| string.as_ptr());
        Ok(Self {
            pointers: pointers.chain([null()]).collect(),
            _owned: owned,
        })
    }
}

/// The program that the child becomes.
pub(super) struct Image {
    /// Where it is looked for, in order.
    candidates: Vec<CString>,
    argv: Strings,
    env: Strings,
}

impl Image {
    /// # Errors
    /// It can be no program.
    pub(super) fn new(plan: &RankPlan) -> Result<Self, SpawnError> {
        let cannot = |error| SpawnError::CannotExecute {
            program: plan.argv.first().cloned().unwrap_or_default(),
            error: Text(error),
        };
        if plan.argv.first().is_none_or(String::is_empty) {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "no program is named");
            return Err(cannot(error));
        }
        Self::build(plan).map_err(cannot)
    }

    fn build(plan: &RankPlan) -> io::Result<Self> {
        let program = plan.argv.first().map_or("", String::as_str);
        let env = plan
            .env
            .iter()
            .map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat());
        Ok(Self {
            candidates: candidates(program, plan.env.get("PATH").map(AsRef::as_ref))?,
            argv: Strings::new(plan.argv.iter().map(|text| text.clone().into_bytes()))?,
            env: Strings::new(env)?,
        })
    }
}

impl Image {
    /// For a script without a first line: the shell, with a place for the script's path.
    pub(super) fn shell_argv(&self) -> Vec<*const c_char> {
        let arguments = self.argv.pointers.get(1..).unwrap_or_default();
        [&[SHELL.as_ptr(), null()], arguments].concat()
    }
}

/// The files that a program's name may mean. Nothing in `PATH` stands for the working directory.
fn candidates(program: &str, path: Option<&OsStr>) -> io::Result<Vec<CString>> {
    if program.contains('/') {
        return Ok(vec![CString::new(program)?]);
    }
    let dirs = path
        .map_or(DEFAULT_PATH, OsStr::as_bytes)
        .split(|byte| *byte == b':');
    let files = dirs.map(|dir| {
        let file = Path::new(OsStr::from_bytes(dir)).join(program);
        CString::new(file.into_os_string().as_encoded_bytes())
    });
    Ok(files.collect::<Result<_, _>>()?)
}

/// Why there is no program.
pub(super) enum Failed {
    /// A step before the program failed for a cause that lies in this machine.
    Setup(io::Error),
    Exec(Errno),
}

impl Failed {
    /// Whose fault it is.
    pub(super) fn explain(self, plan: &RankPlan) -> SpawnError {
        match self {
            Self::Setup(error) => SpawnError::Machine(Text(error)),
            Self::Exec(errno @ (Errno::EAGAIN | Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE)) => {
                SpawnError::Machine(Text(errno.into()))
            }
            Self::Exec(errno) => {
                let program = plan.argv.first().map_or("", String::as_str);
                SpawnError::CannotExecute {
                    program: program.to_owned(),
                    error: Text(searched(program, plan, errno)),
                }
            }
        }
    }
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Setup(error)
    }
}

/// What the child finds ready.
struct Birth<'a> {
    image: &'a Image,
    /// For a script without a first line: the shell, with a place for the script's path.
    shell_argv: Vec<*const c_char>,
    work: CString,
    identity: Option<&'a Identity>,
    shim: Pid,
    null: RawFd,
    stdout: RawFd,
    stderr: RawFd,
    /// Where it tells why it failed; closed by success.
    report: RawFd,
}

/// In the child's report: which step failed.
const SETUP: u8 = 0;
const EXEC: u8 = 1;
const REPORT_BYTES: usize = 5;

fn start(image: &Image, setup: &Setup) -> Result<Started, Failed> {
    let null_device = File::open("/dev/null")?;
    let (stdout, their_stdout) = io::pipe()?;
    let (stderr, their_stderr) = io::pipe()?;
    let (mut report, their_report) = io::pipe()?;
    let birth = Birth {
        image,
        shell_argv: image.shell_argv(),
        work: CString::new(setup.work.as_os_str().as_bytes()).map_err(io::Error::from)?,
        identity: setup.identity.as_ref(),
        shim: getpid(),
        null: null_device.as_raw_fd(),
        stdout: their_stdout.as_raw_fd(),
        stderr: their_stderr.as_raw_fd(),
        report: their_report.as_raw_fd(),
    };
    let cgroup = setup.cgroup.as_ref().map(AsRawFd::as_raw_fd);
    let pid = bear(cgroup, birth)?;
    drop((their_stdout, their_stderr, their_report));
    let mut told = Vec::with_capacity(REPORT_BYTES);
    report.read_to_end(&mut told)?;
    let Some((step, errno)) = told.split_first() else {
        return Ok(Started {
            pid,
            stdout: stdout.into(),
            stderr: stderr.into(),
        });
    };
    // It is on its way out. Whoever else waits for children does it in this thread.
    let _ = nix::sys::wait::waitpid(Pid::from_raw(pid), None);
    let errno = errno
        .first_chunk()
        .map_or(0, |bytes| i32::from_le_bytes(*bytes));
    Err(match *step {
        EXEC => Failed::Exec(Errno::from_raw(errno)),
        _ => Failed::Setup(io::Error::from_raw_os_error(errno)),
    })
}

/// Makes the child, in the cgroup if the kernel lets us; else it moves there by itself.
#[expect(unsafe_code, reason = "no library makes a child in a cgroup")]
fn bear(cgroup: Option<RawFd>, birth: Birth<'_>) -> Result<i32, io::Error> {
    if let Some(directory) = cgroup {
        // SAFETY: no flag shares memory or asks the kernel to write anywhere, so the child is a copy as after `fork`,
        // and goes on below with nothing but `be_born`.
        let result = unsafe {
            // SAFETY: the structure holds integers only, for which zero means "not asked for".
            let mut arguments: libc::clone_args = std::mem::zeroed();
            arguments.flags = CLONE_INTO_CGROUP;
            arguments.exit_signal = libc::SIGCHLD as u64;
            arguments.cgroup = directory as u64;
            libc::syscall(
                libc::SYS_clone3,
                &raw const arguments,
                size_of_val(&arguments),
            )
        };
        if result == 0 {
            be_born(birth, None);
        }
        if let Ok(pid) = i32::try_from(result)
            && pid > 0
        {
            return Ok(pid);
        }
        // An older kernel, a filter of system calls, or a cgroup that takes nobody.
    }
    // SAFETY: the child goes on with nothing but `be_born`, which makes system calls only.
    match unsafe { libc::fork() } {
        0 => be_born(birth, cgroup),
        pid => Ok(Errno::result(pid)?),
    }
}

/// Runs in the child, and ends there.
#[expect(unsafe_code, reason = "system calls between fork and exec")]
fn be_born(mut birth: Birth<'_>, cgroup: Option<RawFd>) -> ! {
    let (step, errno) = match become_rank(&birth, cgroup) {
        Err(errno) => (SETUP, errno),
        Ok(()) => (EXEC, execute(birth.image, &mut birth.shell_argv)),
    };
    let [a, b, c, d] = (errno as c_int).to_le_bytes();
    let report = [step, a, b, c, d];
    // SAFETY: the buffer is alive; the descriptor is open; `_exit` runs nothing of the copied process.
    unsafe {
        libc::write(birth.report, report.as_ptr().cast(), report.len());
        libc::_exit(127)
    }
}

/// Makes the child an ordinary process with nothing of the shim's.
#[expect(unsafe_code, reason = "system calls between fork and exec")]
fn become_rank(birth: &Birth<'_>, cgroup: Option<RawFd>) -> Result<(), Errno> {
    setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
    if let Some(cgroup) = cgroup {
        // Failing here is not fatal: the shim then finds it as its descendant.
        enter(cgroup);
    }
    umask(Mode::from_bits_truncate(0o022));
    // No core files with secrets in them unless the program raises the limit itself.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_CORE) {
        let _ = setrlimit(Resource::RLIMIT_CORE, 0, hard);
    }
    default_signals();
    close_others();
    for (from, to) in [(birth.null, 0), (birth.stdout, 1), (birth.stderr, 2)] {
        // SAFETY: takes two integers. The shim's own 0 to 2 are always open, so none of ours has their numbers.
        Errno::result(unsafe { libc::dup2(from, to) })?;
    }
    // SAFETY: the path is a live string that ends in a null byte.
    Errno::result(unsafe { libc::chdir(birth.work.as_ptr()) })?;
    if let Some(identity) = birth.identity {
        drop_to(identity)?;
    }
    // After the change of user, which clears it.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != birth.shim {
        return Err(Errno::ESRCH);
    }
    Ok(())
}

/// Becomes the program, or tells why not. Follows the C library's `execvp`.
#[expect(unsafe_code, reason = "system calls between fork and exec")]
pub(super) fn execute(image: &Image, shell_argv: &mut [*const c_char]) -> Errno {
    let (argv, env) = (image.argv.pointers.as_ptr(), image.env.pointers.as_ptr());
    let mut answer = Errno::ENOENT;
    for file in &image.candidates {
        // SAFETY: all are strings that end in a null byte, in lists that end in a null pointer, and alive.
        unsafe { libc::execve(file.as_ptr(), argv, env) };
        let mut errno = Errno::last();
        if errno == Errno::ENOEXEC {
            shell_argv[1] = file.as_ptr();
            // SAFETY: likewise.
            unsafe { libc::execve(SHELL.as_ptr(), shell_argv.as_ptr(), env) };
            errno = Errno::last();
        }
        match errno {
            Errno::EACCES => answer = errno,
            Errno::ENOENT | Errno::ESTALE | Errno::ENOTDIR | Errno::ENODEV | Errno::ETIMEDOUT => {}
            _ => return errno,
        }
    }
    answer
}

#[expect(unsafe_code, reason = "system calls between fork and exec")]
fn enter(cgroup: RawFd) {
    // SAFETY: the descriptor is open (see `bear`), the name ends in a null byte, and the buffer holds one byte.
    unsafe {
        let entrance = libc::openat(
            cgroup,
            c"cgroup.procs".as_ptr(),
            libc::O_WRONLY | libc::O_CLOEXEC,
        );
        libc::write(entrance, b"0".as_ptr().cast(), 1);
    }
}

/// No signal is blocked or ignored in a program that did not ask for it.
#[expect(
    unsafe_code,
    reason = "the C library hides two signals, which may be ignored all the same"
)]
fn default_signals() {
    /// As long as the kernel's `struct sigaction` on any architecture; zeros mean the default action.
    const DEFAULT: [u64; 8] = [0; 8];
    /// Bytes of the kernel's set of signals.
    const SET_BYTES: usize = 8;
    for signal in 1..=LAST_SIGNAL {
        let old: *mut u64 = std::ptr::null_mut();
        // SAFETY: the kernel reads at most the constant, writes nothing, and refuses the signals that cannot be set.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT.as_ptr(),
                old,
                SET_BYTES,
            );
        }
    }
    let _ = nix::sys::signal::SigSet::empty().thread_set_mask();
}

/// Becomes another user for good. By system calls: the C library would tell all threads of the process, and believes in
/// those that the child has not got.
#[expect(
    unsafe_code,
    reason = "the C library's wrappers are not for this place"
)]
pub(super) fn drop_to(identity: &Identity) -> Result<(), Errno> {
    let (uid, gid) = (identity.uid, identity.gid);
    // SAFETY: the pointer and the length are those of one live vector.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_setgroups,
            identity.groups.len(),
            identity.groups.as_ptr(),
        )
    })?;
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
    Ok(())
}
