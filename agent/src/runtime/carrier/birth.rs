//! How the one process of a task is made: like `vfork`, in the carrier's memory until it becomes its program, so that
//! nothing has to be copied for it. Knows nothing of what becomes of it.
//!
//! Between the call and the program the child borrows everything of the thread that made it, which waits meanwhile: it
//! must not allocate, take a lock, unwind, or return. It makes raw system calls only, and leaves its answer in memory.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::ptr::null;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc::{self, c_char, c_int, c_void, rlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpid};

use super::super::spawn::{Failed, Identity, Image, Started, drop_to, execute};

/// What the child needs until it is its program: a few frames, and what the C library's system call takes.
const STACK_BYTES: usize = 64 << 10;
/// Linux's signals are 1 to 64.
const LAST_SIGNAL: c_int = 64;
/// Bytes of the kernel's set of signals.
const SET_BYTES: usize = 8;
/// As long as the kernel's `struct sigaction` on any architecture; zeros mean the default action.
type Action = [u64; 8];

/// What all tasks of a bundle have in common, found out once.
#[derive(Debug)]
pub(super) struct Nursery {
    null_device: File,
    identity: Option<Identity>,
    carrier: i32,
    /// Signals that this process ignores, which a program would inherit.
    ignored: Vec<c_int>,
    /// No core files with secrets in them unless the program raises the limit itself.
    core: rlimit,
    /// What this process had before it asked for more.
    files: rlimit,
    /// What the limit on file locks may be raised to, which marks a task's processes.
    locks: rlimit,
}

impl Nursery {
    /// `files` is the limit on open files that tasks get.
    pub(super) fn new(identity: Option<Identity>, files: (u64, u64)) -> io::Result<Self> {
        use nix::sys::resource::{Resource, getrlimit};
        let (_, core) = getrlimit(Resource::RLIMIT_CORE)?;
        let (_, locks) = getrlimit(Resource::RLIMIT_LOCKS)?;
        Ok(Self {
            null_device: File::open("/dev/null")?,
            identity,
            carrier: getpid().as_raw(),
            ignored: ignored_signals(),
            core: limit(0, core),
            files: limit(files.0, files.1),
            locks: limit(locks, locks),
        })
    }
}

fn limit(soft: u64, hard: u64) -> rlimit {
    rlimit {
        rlim_cur: soft,
        rlim_max: hard,
    }
}

/// A place for one child at a time. Belongs to one thread.
#[derive(Debug)]
pub(super) struct Cradle {
    stack: Box<[u128]>,
}

/// The process of a task, and the read ends of what it writes.
#[derive(Debug)]
pub(super) struct Child {
    pub(super) started: Started,
    pub(super) pidfd: OwnedFd,
}

/// What the child finds ready, and where it leaves its answer.
struct Orders<'a> {
    nursery: &'a Nursery,
    image: &'a Image,
    shell_argv: Vec<*const c_char>,
    work: CString,
    stdout: RawFd,
    stderr: RawFd,
    tag: rlimit,
    /// Whether all but the program worked.
    set_up: bool,
    /// Zero while nothing failed.
    errno: c_int,
}

impl Cradle {
    pub(super) fn new() -> Self {
        Self {
            stack: vec![0; STACK_BYTES / size_of::<u128>()].into_boxed_slice(),
        }
    }

    /// Starts a task's process in `work`, marked with `tag`. Must be called from a thread that lives as long as the
    /// carrier, with all signals blocked: the process is killed when it ends.
    pub(super) fn spawn(
        &mut self,
        nursery: &Nursery,
        image: &Image,
        work: &Path,
        tag: u64,
    ) -> Result<Child, Failed> {
        let (stdout, their_stdout) = io::pipe()?;
        let (stderr, their_stderr) = io::pipe()?;
        for ours in [&stdout, &stderr] {
            // A new pipe has no other flags.
            fcntl(ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(io::Error::from)?;
        }
        let mut orders = Orders {
            nursery,
            image,
            shell_argv: image.shell_argv(),
            work: CString::new(work.as_os_str().as_bytes()).map_err(io::Error::from)?,
            stdout: their_stdout.as_raw_fd(),
            stderr: their_stderr.as_raw_fd(),
            tag: limit(tag.min(nursery.locks.rlim_max), nursery.locks.rlim_max),
            set_up: false,
            errno: 0,
        };
        let (pid, pidfd) = self.bear(&mut orders)?;
        if orders.errno == 0 {
            let (stdout, stderr) = (stdout.into(), stderr.into());
            return Ok(Child {
                started: Started {
                    pid,
                    stdout,
                    stderr,
                },
                pidfd,
            });
        }
        let _ = wait(pid, true);
        let errno = Errno::from_raw(orders.errno);
        Err(match orders.set_up {
            true => Failed::Exec(errno),
            false => Failed::Setup(errno.into()),
        })
    }

    #[expect(unsafe_code, reason = "no library makes a child like this one")]
    fn bear(&mut self, orders: &mut Orders<'_>) -> io::Result<(i32, OwnedFd)> {
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
        let mut pidfd: c_int = -1;
        let orders: *mut Orders<'_> = orders;
        // SAFETY: the child runs `be_born` on a stack of its own, which nothing else uses, while this thread waits in
        // the call until the child has become its program or has ended; so what both see is used by one at a time. The
        // orders and the place for the descriptor outlive the call. The end of the stack is aligned as a `u128` is.
        let pid = unsafe {
            let stack = self.stack.as_mut_ptr_range().end;
            libc::clone(be_born, stack.cast(), flags, orders.cast(), &raw mut pidfd)
        };
        let pid = Errno::result(pid)?;
        if pidfd < 0 {
            // A kernel that does not know the flag ignores it.
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
            let _ = wait(pid, true);
            return Err(Errno::ENOSYS.into());
        }
        // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
        Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
    }
}

/// Runs in the child, and never returns from there.
#[expect(unsafe_code, reason = "system calls between clone and exec")]
extern "C" fn be_born(orders: *mut c_void) -> c_int {
    // SAFETY: `bear` passes its orders, which live, and touches them again only after this process has left its memory.
    let orders = unsafe { &mut *orders.cast::<Orders<'_>>() };
    let errno = match become_task(orders) {
        Err(errno) => errno,
        Ok(()) => {
            orders.set_up = true;
            execute(orders.image, &mut orders.shell_argv)
        }
    };
    orders.errno = errno as c_int;
    // SAFETY: ends this process and runs nothing of the other one's.
    unsafe { libc::_exit(127) }
}

/// Makes the child an ordinary process with nothing of the carrier's. Every descriptor of the carrier closes itself.
#[expect(unsafe_code, reason = "system calls between clone and exec")]
fn become_task(orders: &Orders<'_>) -> Result<(), Errno> {
    const DEFAULT: Action = [0; 8];
    static NO_SIGNALS: u64 = 0;
    let nursery = orders.nursery;
    let old: *mut rlimit = std::ptr::null_mut();
    // SAFETY: these take integers, and pointers to what lives in `orders` or is constant.
    unsafe {
        Errno::result(libc::syscall(libc::SYS_setsid))?;
        libc::syscall(libc::SYS_umask, 0o022);
        for (resource, limit) in [
            (libc::RLIMIT_CORE, &nursery.core),
            (libc::RLIMIT_NOFILE, &nursery.files),
            (libc::RLIMIT_LOCKS, &orders.tag),
        ] {
            libc::syscall(libc::SYS_prlimit64, 0, resource, limit, old);
        }
        for signal in &nursery.ignored {
            libc::syscall(
                libc::SYS_rt_sigaction,
                *signal,
                DEFAULT.as_ptr(),
                null::<Action>(),
                SET_BYTES,
            );
        }
        // The carrier's own 0 to 2 are always open, so none of these has their numbers.
        for (from, to) in [
            (nursery.null_device.as_raw_fd(), 0),
            (orders.stdout, 1),
            (orders.stderr, 2),
        ] {
            Errno::result(libc::dup2(from, to))?;
        }
        Errno::result(libc::syscall(libc::SYS_chdir, orders.work.as_ptr()))?;
    }
    if let Some(identity) = &nursery.identity {
        drop_to(identity)?;
    }
    // SAFETY: as above.
    unsafe {
        // After the change of user, which clears it.
        Errno::result(libc::syscall(
            libc::SYS_prctl,
            libc::PR_SET_PDEATHSIG,
            libc::SIGKILL,
            0,
            0,
            0,
        ))?;
        if libc::syscall(libc::SYS_getppid) != i64::from(nursery.carrier) {
            return Err(Errno::ESRCH);
        }
        Errno::result(libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const NO_SIGNALS,
            null::<u64>(),
            SET_BYTES,
        ))?;
    }
    Ok(())
}

#[expect(
    unsafe_code,
    reason = "the C library hides two signals, which may be ignored all the same"
)]
fn ignored_signals() -> Vec<c_int> {
    let is_ignored = |signal: &c_int| {
        let mut action: Action = [0; 8];
        // SAFETY: the kernel writes at most the whole array; the handler is its first word on every architecture that
        // has this order, and asking for a signal that cannot be changed is allowed.
        let result = unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                *signal,
                null::<Action>(),
                action.as_mut_ptr(),
                SET_BYTES,
            )
        };
        result == 0 && action[0] == libc::SIG_IGN as u64
    };
    (1..=LAST_SIGNAL).filter(is_ignored).collect()
}

/// Takes the exit status of a child, waiting for it if asked to; nothing if it has not ended. By number, so that no other
/// thread's child is taken.
#[expect(unsafe_code, reason = "the library's wrapper loses some exit statuses")]
pub(super) fn wait(pid: i32, patiently: bool) -> Option<ExitStatus> {
    let options = if patiently { 0 } else { libc::WNOHANG };
    let mut status: c_int = 0;
    loop {
        // SAFETY: `status` is a valid place for one integer for the time of the call.
        let result = unsafe { libc::waitpid(pid, &raw mut status, options) };
        match Errno::result(result) {
            Ok(0) => return None,
            Ok(_) => return Some(ExitStatus::from_raw(status)),
            Err(Errno::EINTR) => {}
            Err(_) => return None,
        }
    }
}
