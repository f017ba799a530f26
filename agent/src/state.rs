//! What an agent keeps about itself in its data directory: the lock that makes it the only one there, how often it has
//! started, and the highest term that it has seen.
//!
//! `agent.json` is written over in place, so that an agent starts, and obeys a new coordinator, on a full disk too.
//! Losing it loses no member: attempts are found by their directories. A damaged one is set aside with a
//! warning; the incarnation then starts above any real one's by taking the time.
//!
//! Losing the attempts is another thing: what the coordinator placed here before may have run, and nothing here tells. So
//! the directories of attempts and bundles hold a mark that `agent.json` names, and where that is missing the agent's
//! history begins anew (see [`History`]).

mod slots;

use std::ffi::CString;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Gid, getgrouplist};
use serde::{Deserialize, Serialize};
use trainyard_common::ids::{Incarnation, Term};
use trainyard_transport::files;

use self::slots::Slots;
use crate::runtime::RunAs;
use trainyard_transport::clock;

/// The directory of certificate and key.
pub(crate) const CREDENTIALS: &str = "credentials";
/// The directory of attempts.
pub(crate) const ATTEMPTS: &str = "attempts";
/// The directory of bundles.
pub(crate) const BUNDLES: &str = "bundles";
/// The directory of blobs that were fetched.
pub(crate) const CACHE: &str = "cache";
const STATE: &str = "agent.json";
const LOCK: &str = "agent.lock";
/// In the directories of attempts and bundles: that nothing was placed here before that is not told of there.
pub(crate) const MARK: &str = ".history";
/// Bytes of an `agent.json` as agents before this form wrote it; theirs had about 60.
const MAX_OLD_STATE_BYTES: u64 = 1 << 10;
/// How long another holder of the lock is waited for. An agent that was killed takes a moment until the kernel has taken
/// it down, and a child that it was just making has the lock until that is a program of its own.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why an agent's data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another agent uses it.
    #[error("another agent runs on {dir:?}; each agent needs a data directory of its own")]
    Locked {
        /// The directory.
        dir: PathBuf,
    },
    /// Jobs could not reach their directories.
    #[error(
        "the user {user:?} cannot pass through {dir:?} to the directories of its jobs: allow it with \
         `chmod o+x {}`, or choose another data directory", dir.display()
    )]
    Impassable {
        /// As whom jobs run.
        user: String,
        /// Which directory is in the way.
        dir: PathBuf,
    },
    /// Something in it cannot be read or written.
    #[error("cannot {operation} {path:?}")]
    File {
        /// What was to be done.
        operation: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl StateError {
    /// Whether it may work by itself soon, as jobs that end give space back.
    pub(crate) fn is_disk_full(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        match self {
            Self::File { source, .. } => matches!(source.kind(), StorageFull | QuotaExceeded),
            Self::Locked { .. } | Self::Impassable { .. } => false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Kept {
    incarnation: Incarnation,
    term: Term,
    /// The mark of the attempts and bundles that belong to it; 0 if it was written by an agent that made none.
    #[serde(default)]
    history: u64,
}

impl Kept {
    fn text(&self, path: &Path) -> Result<String, StateError> {
        serde_json::to_string(self).map_err(|error| failed("write", path)(error.into()))
    }
}

/// An agent's data directory, held by its lock.
#[derive(Debug)]
pub(crate) struct AgentState {
    path: PathBuf,
    slots: Slots,
    /// What is on disk, never more.
    kept: Kept,
    boot_id: String,
    /// Present if the attempts of before are not here.
    anew: Option<History>,
    /// Given back when dropped, or when the process ends in whatever way.
    _lock: File,
}

impl AgentState {
    /// Takes the directory, making it if needed, and counts one more start. It blocks, for an agent that is just ending
    /// too.
    pub(crate) fn open(dir: &Path) -> Result<Self, StateError> {
        Self::open_within(dir, PATIENCE)
    }

    fn open_within(dir: &Path, patience: Duration) -> Result<Self, StateError> {
        make_data_dir(dir)?;
        let places = [ATTEMPTS, BUNDLES].map(|place| dir.join(place));
        // Looked at before they are made.
        let found = Found::of(&places);
        make_dir(&dir.join(ATTEMPTS), 0o711)?;
        make_dir(&dir.join(BUNDLES), 0o711)?;
        make_dir(&dir.join(CACHE), 0o700)?;
        let lock = lock(dir, patience)?;
        let path = dir.join(STATE);
        let (slots, mut kept) = load(&path, found)?;
        kept.incarnation = kept.incarnation.next();
        let anew = match found {
            // Those of an agent that made no marks.
            Found::Unmarked => kept.history != 0 && slots.is_some(),
            Found::Marked(mark) => kept.history != 0 && kept.history != mark,
            Found::Nothing => true,
        };
        kept.history = match found {
            Found::Marked(mark) if !anew => mark,
            _ if kept.history != 0 => kept.history,
            _ => new_mark()?,
        };
        let history = History {
            places,
            mark: kept.history,
        };
        let text = kept.text(&path)?;
        let slots = match slots {
            Some(mut slots) => slots.write(&text).map(|()| slots),
            None => Slots::create(&path, &text),
        };
        let slots = slots.map_err(failed("write", &path))?;
        let boot = Path::new("/proc/sys/kernel/random/boot_id");
        let boot_id = fs::read_to_string(boot).map_err(failed("read", boot))?;
        if !anew && !matches!(found, Found::Marked(_)) {
            // Otherwise the next start finds no mark and begins anew, which is safe.
            if let Err(error) = history.mark() {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot mark the directories of attempts"
                );
            }
        }
        Ok(Self {
            path,
            slots,
            kept,
            boot_id: boot_id.trim().to_owned(),
            anew: anew.then_some(history),
            _lock: lock,
        })
    }

    pub(crate) fn incarnation(&self) -> Incarnation {
        self.kept.incarnation
    }

    /// The highest term seen.
    pub(crate) fn term(&self) -> Term {
        self.kept.term
    }

    pub(crate) fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// If what was placed here before may have run without leaving a trace: what says that this is settled.
    pub(crate) fn begins_anew(&mut self) -> Option<History> {
        self.anew.take()
    }

    /// Keeps a higher term, before anything is done on its word. After an error it is as if it had not been seen. It
    /// blocks.
    pub(crate) fn raise_term(&mut self, term: Term) -> Result<(), StateError> {
        if term > self.kept.term {
            let kept = Kept { term, ..self.kept };
            let text = kept.text(&self.path)?;
            let written = self.slots.write(&text);
            written.map_err(failed("write", &self.path))?;
            self.kept = kept;
        }
        Ok(())
    }
}

/// What is found of the attempts and bundles of before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// One of the directories is not there.
    Nothing,
    /// They are, and not both have the mark.
    Unmarked,
    /// Both have this mark.
    Marked(u64),
}

impl Found {
    fn of(places: &[PathBuf]) -> Self {
        if !places.iter().all(|place| place.is_dir()) {
            return Self::Nothing;
        }
        let mark = |place: &PathBuf| -> Option<u64> {
            let text = fs::read_to_string(place.join(MARK)).ok()?;
            u64::from_str_radix(text.trim(), 16)
                .ok()
                .filter(|mark| *mark != 0)
        };
        let marks: Option<Vec<u64>> = places.iter().map(mark).collect();
        match marks.as_deref() {
            Some([first, rest @ ..]) if rest.iter().all(|mark| mark == first) => {
                Self::Marked(*first)
            }
            _ => Self::Unmarked,
        }
    }
}

/// Where an agent without the attempts of before notes that nothing unexplained is left of them. Until then each further
/// start begins anew too.
#[derive(Debug, Clone)]
pub(crate) struct History {
    places: [PathBuf; 2],
    mark: u64,
}

impl History {
    /// Every attempt that was placed before is settled. It blocks.
    pub(crate) fn mark(&self) -> Result<(), StateError> {
        for place in &self.places {
            let path = place.join(MARK);
            files::write_private(&path, format!("{:016x}\n", self.mark).as_bytes())
                .map_err(failed("write", &path))?;
        }
        Ok(())
    }
}

fn new_mark() -> Result<u64, StateError> {
    let mut bytes = [0; 8];
    let source = Path::new("the kernel's random numbers");
    getrandom::fill(&mut bytes).map_err(|error| failed("read", source)(io::Error::other(error)))?;
    Ok(u64::from_ne_bytes(bytes).max(1))
}

/// Makes an agent's data directory and what is missing above it, so that jobs that run as another user can pass through.
/// It blocks.
///
/// # Errors
/// [`StateError::File`].
pub fn make_data_dir(dir: &Path) -> Result<(), StateError> {
    make_dir(dir, 0o711)
}

/// Sees to it that `user` can reach the directories of its jobs. It blocks.
pub(crate) fn let_pass(dir: &Path, user: &RunAs) -> Result<(), StateError> {
    let real = dir.canonicalize().map_err(failed("find", dir))?;
    let groups = CString::new(user.name.as_str())
        .map_err(io::Error::other)
        .and_then(|name| Ok(getgrouplist(&name, Gid::from_raw(user.gid))?))
        .map_err(failed("look up the groups of its user for", dir))?;
    // These are the agent's own; they may have been made by something that knew nothing of other users.
    for own in [real.clone(), real.join(ATTEMPTS), real.join(BUNDLES)] {
        let mode = fs::metadata(&own).map_err(failed("read", &own))?.mode();
        fs::set_permissions(&own, Permissions::from_mode(mode & 0o777 | 0o111))
            .map_err(failed("set the mode of", &own))?;
    }
    for above in real.ancestors().skip(1) {
        let metadata = fs::metadata(above).map_err(failed("read", above))?;
        let mode = metadata.mode();
        // The most specific of the three counts, as for the kernel.
        let passes = if metadata.uid() == user.uid {
            mode & 0o100
        } else if groups.contains(&Gid::from_raw(metadata.gid())) {
            mode & 0o010
        } else {
            mode & 0o001
        };
        if passes == 0 {
            return Err(StateError::Impassable {
                user: user.name.clone(),
                dir: above.to_owned(),
            });
        }
    }
    Ok(())
}

fn lock(dir: &Path, patience: Duration) -> Result<File, StateError> {
    let path = dir.join(LOCK);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(failed("open", &path))?;
    let locked = files::lock_within(file, patience).map_err(failed("lock", &path))?;
    locked.ok_or_else(|| StateError::Locked {
        dir: dir.to_owned(),
    })
}

/// What is kept, and the file to keep it in if there is one already.
fn load(path: &Path, found: Found) -> Result<(Option<Slots>, Kept), StateError> {
    match Slots::open(path) {
        Ok(Some((slots, text))) => {
            if let Ok(mut kept) = serde_json::from_str::<Kept>(&text) {
                if let Some(offset) = slots.damaged() {
                    tracing::warn!(
                        ?path,
                        offset,
                        "half of the agent's state is damaged, the other half may be one step older"
                    );
                    // That step may have been a start.
                    kept.incarnation = kept.incarnation.next();
                }
                return Ok((Some(slots), kept));
            }
        }
        Ok(None) => {
            if let Some(kept) = load_old(path).map_err(failed("read", path))? {
                return Ok((None, kept));
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound && found == Found::Nothing => {
            return Ok((None, Kept::default()));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            tracing::warn!(?path, "the agent's state is lost, starting with a new one");
            return Ok((None, above_all()));
        }
        Err(source) => return Err(failed("read", path)(source)),
    }
    tracing::warn!(
        ?path,
        offset = 0,
        "the agent's state is damaged, starting with a new one"
    );
    fs::rename(path, path.with_extension("json.damaged")).map_err(failed("rename", path))?;
    Ok((None, above_all()))
}

/// What is kept in the stead of what was lost.
fn above_all() -> Kept {
    // The coordinator takes only a growing counter for a new start, and no agent starts once a second for long.
    let incarnation = Incarnation(clock::wall_now().0 / 1000);
    Kept {
        incarnation,
        ..Kept::default()
    }
}

/// What an agent kept that wrote nothing but the JSON into the file.
fn load_old(path: &Path) -> io::Result<Option<Kept>> {
    if fs::metadata(path)?.len() > MAX_OLD_STATE_BYTES {
        return Ok(None);
    }
    Ok(serde_json::from_slice(&fs::read(path)?).ok())
}

fn make_dir(path: &Path, mode: u32) -> Result<(), StateError> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(failed("make", path))
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::File {
        operation,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::SmallDisk;

    #[test]
    fn each_start_counts_and_terms_only_grow() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("agent");
        let mut state = AgentState::open(&dir).unwrap();
        assert_eq!(
            (state.incarnation(), state.term()),
            (Incarnation(1), Term(0))
        );
        assert_eq!(state.boot_id().len(), 36);
        state.raise_term(Term(7)).unwrap();
        state.raise_term(Term(3)).unwrap();
        drop(state);
        let state = AgentState::open(&dir).unwrap();
        assert_eq!(
            (state.incarnation(), state.term()),
            (Incarnation(2), Term(7))
        );
    }

    #[test]
    fn the_user_of_jobs_can_reach_them_or_is_told_what_is_in_the_way() {
        let temp = tempfile::tempdir().unwrap();
        let above = temp.path().canonicalize().unwrap().join("above");
        let dir = above.join("agent");
        let user = RunAs {
            uid: 65_533,
            gid: 65_533,
            name: "nobody-of-ours".to_owned(),
            home: "/".into(),
        };
        drop(AgentState::open(&dir).unwrap());
        let set = |path: &Path, mode| {
            fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        };
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        set(temp.path(), 0o711);
        set(&dir, 0o700);
        let_pass(&dir, &user).unwrap();
        assert_eq!(mode(&dir), 0o711);
        assert_eq!(mode(&dir.join(CACHE)), 0o700);
        set(&above, 0o700);
        let error = let_pass(&dir, &user).unwrap_err();
        assert!(
            matches!(&error, StateError::Impassable { dir, .. } if *dir == above),
            "{error:?}"
        );
        assert!(error.to_string().contains("chmod o+x"), "{error}");
    }

    #[test]
    fn a_second_agent_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let first = AgentState::open(temp.path()).unwrap();
        let short = Duration::from_millis(10);
        let error = AgentState::open_within(temp.path(), short).unwrap_err();
        assert!(matches!(error, StateError::Locked { .. }), "{error:?}");
        drop(first);
        let second = AgentState::open(temp.path()).unwrap();
        assert_eq!(
            second.incarnation(),
            Incarnation(2),
            "the refused one does not count"
        );
    }

    #[test]
    fn an_agent_that_is_just_ending_is_waited_for() {
        let temp = tempfile::tempdir().unwrap();
        let first = AgentState::open(temp.path()).unwrap();
        let inode = fs::metadata(temp.path().join(LOCK)).unwrap().ino();
        let waiting = || {
            let locks = fs::read_to_string("/proc/locks").unwrap();
            let own = format!(":{inode} ");
            let mut lines = locks.lines();
            lines.any(|line| line.contains("->") && line.contains(&own))
        };
        let dir = temp.path().to_owned();
        let patience = Duration::from_secs(60);
        let second = std::thread::spawn(move || AgentState::open_within(&dir, patience));
        while !waiting() {
            assert!(!second.is_finished(), "it does not wait");
            std::thread::yield_now();
        }
        drop(first);
        let second = second.join().unwrap().unwrap();
        assert_eq!(second.incarnation(), Incarnation(2));
    }

    #[test]
    fn a_term_counts_only_when_it_is_on_disk() {
        let temp = tempfile::tempdir().unwrap();
        let mut state = AgentState::open(temp.path()).unwrap();
        state.raise_term(Term(3)).unwrap();
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let real = state.slots.replace_file(full);
        // The second try must not find that the term was seen already.
        for _ in 0..2 {
            let error = state.raise_term(Term(7)).unwrap_err();
            assert!(error.is_disk_full(), "{error:?}");
            assert_eq!(state.term(), Term(3));
        }
        state.slots.replace_file(real);
        state.raise_term(Term(7)).unwrap();
        assert_eq!(state.term(), Term(7));
        drop(state);
        let state = AgentState::open(temp.path()).unwrap();
        assert_eq!(state.term(), Term(7));
    }

    #[test]
    fn an_agent_starts_and_obeys_on_a_full_disk() {
        let Some(disk) = SmallDisk::mount() else {
            return;
        };
        let dir = disk.path().join("agent");
        drop(AgentState::open(&dir).unwrap());
        disk.fill();
        for start in 1..=3 {
            let mut state = AgentState::open(&dir).unwrap();
            state.raise_term(Term(start)).unwrap();
            assert_eq!(state.incarnation(), Incarnation(start + 1));
        }
        let state = AgentState::open(&dir).unwrap();
        assert_eq!(
            (state.incarnation(), state.term()),
            (Incarnation(5), Term(3))
        );
        // Otherwise all of this would show nothing.
        fs::write(disk.path().join("more"), "x").unwrap_err();
    }

    #[test]
    fn a_file_of_an_agent_before_is_taken_over() {
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join(STATE), "{\"incarnation\":41,\"term\":7}").unwrap();
        for start in [42, 43] {
            let state = AgentState::open(temp.path()).unwrap();
            assert_eq!(
                (state.incarnation(), state.term()),
                (Incarnation(start), Term(7))
            );
        }
        assert!(!temp.path().join("agent.json.damaged").exists());
    }

    /// Nothing is left to take for new once the coordinator has told all; before that every start says so.
    #[test]
    fn a_history_that_is_lost_is_noticed() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("agent");
        let open = || AgentState::open(&dir).unwrap();
        assert!(open().begins_anew().is_some(), "the first start of all");
        let history = open()
            .begins_anew()
            .expect("nobody said that all is settled");
        history.mark().unwrap();
        assert!(open().begins_anew().is_none());
        // Only what the agent keeps about itself is lost.
        fs::remove_file(dir.join(STATE)).unwrap();
        let mut state = open();
        assert!(state.incarnation().0 > 1_600_000_000);
        assert!(state.begins_anew().is_none());
        drop(state);
        assert!(open().begins_anew().is_none());
        // What was in one of the two is lost, or all of it, or one directory.
        for lost in [ATTEMPTS, BUNDLES] {
            fs::remove_dir_all(dir.join(lost)).unwrap();
            open().begins_anew().expect("noticed").mark().unwrap();
            fs::remove_file(dir.join(lost).join(MARK)).unwrap();
            open().begins_anew().expect("noticed").mark().unwrap();
            assert!(open().begins_anew().is_none());
        }
        fs::remove_dir_all(&dir).unwrap();
        assert!(open().begins_anew().is_some());
    }

    #[test]
    fn the_attempts_of_an_agent_without_marks_are_its_history() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        for place in [ATTEMPTS, BUNDLES] {
            fs::create_dir(dir.join(place)).unwrap();
        }
        let kept = "{\"incarnation\":41,\"term\":7}";
        drop(Slots::create(&dir.join(STATE), kept).unwrap());
        for start in [42, 43] {
            let mut state = AgentState::open(dir).unwrap();
            assert_eq!(state.incarnation(), Incarnation(start));
            assert!(state.begins_anew().is_none());
        }
        fs::remove_dir_all(dir.join(ATTEMPTS)).unwrap();
        assert!(AgentState::open(dir).unwrap().begins_anew().is_some());
    }

    /// Both forms in which it was ever written, and that of before, byte for byte.
    #[test]
    fn every_damage_of_the_golden_state_is_seen_or_changes_nothing() {
        let golden = include_bytes!("../golden/agent-2.json");
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join(STATE);
        let read = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let (slots, kept) = load(&path, Found::Unmarked).unwrap();
            let damaged = slots.is_some_and(|slots| slots.damaged().is_some());
            (kept, damaged)
        };
        let whole = Kept {
            incarnation: Incarnation(42),
            term: Term(7),
            history: 0xabcd,
        };
        assert_eq!(read(golden), (whole, false));
        let old = Kept {
            history: 0,
            ..whole
        };
        assert_eq!(read(include_bytes!("../golden/agent-1.json")), (old, false));
        for plain in 0..golden.len() {
            // Nothing but whole files is taken.
            let (kept, _) = read(&golden[..plain]);
            assert!(kept.incarnation.0 > 1_600_000_000, "cut at {plain}");
        }
        let text = |slot: &[u8]| slot.iter().position(|byte| *byte == b'\n').unwrap() + 1;
        let (first, second) = golden.split_at(4096);
        for (start, length) in [(0, text(first) + 8), (4096, text(second) + 8)] {
            for bit in start * 8..(start + length) * 8 {
                let mut flipped = golden.to_vec();
                flipped[bit / 8] ^= 1 << (bit % 8);
                let (kept, damaged) = read(&flipped);
                if damaged {
                    // One step back at most, and the start that it may have been is counted.
                    assert!(
                        (43..=44).contains(&(kept.incarnation.0 + 1)),
                        "{bit}: {kept:?}"
                    );
                    assert!([6, 7].contains(&kept.term.0), "{bit}: {kept:?}");
                } else {
                    assert_eq!(kept, whole, "bit {bit}");
                }
            }
        }
    }

    #[test]
    fn a_damaged_file_is_set_aside() {
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join(STATE), "{\"incarnation\":").unwrap();
        let state = AgentState::open(temp.path()).unwrap();
        assert!(state.incarnation().0 > 1_600_000_000);
        assert!(temp.path().join("agent.json.damaged").exists());
    }
}
