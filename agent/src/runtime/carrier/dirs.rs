//! The directories of a slot: `work`, `outputs`, `checkpoint` and `tmp`. A task finds them empty, or with a fresh copy of
//! the snapshot. Most tasks leave them as they found them, and then the next one has the same; what a task left is moved
//! away, for upload or to be deleted by somebody else.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use nix::errno::Errno;
use nix::libc;
use trainyard_common::ids::TaskIndex;

use super::super::RunAs;
use super::super::dir::AttemptDir;
use super::super::remove::{delete_tree, give};
use super::super::shim::note;
use super::{BundleDir, make_dir};

/// Directories that wait to be deleted. Beyond that a slot waits, so that a disk does not fill up with what nobody needs.
const TRASH_QUEUE: usize = 256;
/// Bytes of a directory's list that are read to see whether anything is in it.
const LIST_BYTES: usize = 1024;

/// Deletes in a thread of its own what it is sent.
pub(super) fn start_cleaner() -> io::Result<SyncSender<PathBuf>> {
    let (trash, paths): (_, Receiver<PathBuf>) = sync_channel(TRASH_QUEUE);
    std::thread::Builder::new()
        .name("cleaner".to_owned())
        .spawn(move || {
            while let Ok(path) = paths.recv() {
                if let Err(error) = delete(&path) {
                    note(&format!("cannot delete {}: {error}", path.display()));
                }
            }
        })?;
    Ok(trash)
}

fn delete(path: &Path) -> io::Result<()> {
    if path.symlink_metadata()?.is_dir() {
        delete_tree(path)
    } else {
        std::fs::remove_file(path)
    }
}

/// What a task left.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Left {
    /// Whether there is something to upload.
    pub(super) outputs: bool,
    /// What is not kept, and why.
    pub(super) warning: String,
}

/// One slot's directories.
#[derive(Debug)]
pub(super) struct SlotDirs {
    dir: BundleDir,
    slot: AttemptDir,
    user: Option<RunAs>,
    /// The snapshot, if the job has one.
    template: Option<PathBuf>,
    trash: SyncSender<PathBuf>,
    work: Option<Place>,
    outputs: Option<Place>,
    checkpoint: Option<Place>,
    tmp: Option<Place>,
}

/// A directory as it was made.
#[derive(Debug)]
struct Place {
    /// Held, to look into it cheaply.
    file: File,
    made: Shape,
}

/// What makes a directory this very one, and usable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    device: u64,
    inode: u64,
    mode: u32,
    owner: (u32, u32),
}

impl Shape {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
        }
    }
}

/// Names in `trash` are used once.
static NEXT_TRASH: AtomicU64 = AtomicU64::new(0);

impl SlotDirs {
    pub(super) fn new(
        dir: &BundleDir,
        slot: u32,
        user: Option<RunAs>,
        template: Option<PathBuf>,
        trash: SyncSender<PathBuf>,
    ) -> io::Result<Self> {
        let slot = dir.slot(slot, TaskIndex(0));
        let mode = if user.is_some() { 0o711 } else { 0o700 };
        match make_dir(slot.root(), mode) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => result?,
        }
        Ok(Self {
            dir: dir.clone(),
            slot,
            user,
            template,
            trash,
            work: None,
            outputs: None,
            checkpoint: None,
            tmp: None,
        })
    }

    /// Makes what is missing.
    pub(super) fn prepare(&mut self) -> io::Result<()> {
        for (place, path) in [
            (&mut self.outputs, self.slot.outputs()),
            (&mut self.checkpoint, self.slot.checkpoint()),
            (&mut self.tmp, self.slot.tmp()),
        ] {
            if place.is_none() {
                *place = Some(Place::make(&path, self.user.as_ref())?);
            }
        }
        if self.work.is_none() {
            let path = self.slot.work();
            if let Some(template) = &self.template {
                copy_tree(template, &path)?;
                if let Some(user) = &self.user {
                    give(&path, user)?;
                }
            }
            let user = self.user.as_ref();
            self.work = Some(match self.template {
                Some(_) => Place::hold(&path)?,
                None => Place::make(&path, user)?,
            });
        }
        Ok(())
    }

    /// Takes what a task left out of the way. Nothing of the task may be alive.
    pub(super) fn collect(&mut self, task: TaskIndex) -> Left {
        let clean = |place: &Option<Place>, path: &Path| {
            place.as_ref().is_some_and(|place| place.is_clean(path))
        };
        let (outputs, checkpoint) = (self.slot.outputs(), self.slot.checkpoint());
        let mut left = Left::default();
        if !clean(&self.outputs, &outputs) || !clean(&self.checkpoint, &checkpoint) {
            (self.outputs, self.checkpoint) = (None, None);
            match self.keep(task) {
                Ok(()) => left.outputs = true,
                Err(error) => {
                    left.warning = format!("the outputs could not be set aside: {error}");
                    self.discard(&outputs);
                    self.discard(&checkpoint);
                }
            }
        }
        if !clean(&self.tmp, &self.slot.tmp()) {
            self.tmp = None;
            self.discard(&self.slot.tmp());
        }
        if self.template.is_some() || !clean(&self.work, &self.slot.work()) {
            self.work = None;
            self.discard(&self.slot.work());
        }
        left
    }

    /// What a slot had when something went wrong is of no use.
    pub(super) fn abandon(&mut self) {
        (self.outputs, self.checkpoint, self.tmp, self.work) = (None, None, None, None);
        for path in [
            self.slot.outputs(),
            self.slot.checkpoint(),
            self.slot.tmp(),
            self.slot.work(),
        ] {
            self.discard(&path);
        }
    }

    fn keep(&self, task: TaskIndex) -> io::Result<()> {
        let kept = self.dir.task(task);
        make_dir(kept.root(), 0o700)?;
        move_away(&self.slot.outputs(), &kept.outputs())?;
        move_away(&self.slot.checkpoint(), &kept.checkpoint())
    }

    fn discard(&self, path: &Path) {
        let number = NEXT_TRASH.fetch_add(1, Ordering::Relaxed);
        let trash = self.dir.trash().join(number.to_string());
        match move_away(path, &trash) {
            // The cleaner lives as long as the carrier.
            Ok(()) => drop(self.trash.send(trash)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => note(&format!("cannot clear {}: {error}", path.display())),
        }
    }
}

impl Place {
    fn make(path: &Path, user: Option<&RunAs>) -> io::Result<Self> {
        make_dir(path, 0o700)?;
        if let Some(user) = user {
            std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid))?;
        }
        Self::hold(path)
    }

    fn hold(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(path)?;
        let made = Shape::of(&file.metadata()?);
        Ok(Self { file, made })
    }

    /// Whether it is as it was made: the same, with the same rights, and empty.
    fn is_clean(&self, path: &Path) -> bool {
        path.symlink_metadata()
            .is_ok_and(|metadata| Shape::of(&metadata) == self.made)
            && is_empty(&self.file).unwrap_or(false)
    }
}

/// Moving a directory changes its "..", which needs the right to write it.
fn move_away(from: &Path, to: &Path) -> io::Result<()> {
    if from.symlink_metadata()?.is_dir() {
        let _ = std::fs::set_permissions(from, Permissions::from_mode(0o700));
    }
    std::fs::rename(from, to)
}

/// Whether a directory holds nothing but itself and its parent.
#[expect(
    unsafe_code,
    reason = "the library's way opens the directory anew and allocates 32 KiB"
)]
fn is_empty(dir: &File) -> io::Result<bool> {
    let mut list = [0_u64; LIST_BYTES / size_of::<u64>()];
    // SAFETY: takes integers only.
    Errno::result(unsafe { libc::lseek(dir.as_raw_fd(), 0, libc::SEEK_SET) })?;
    // SAFETY: the kernel writes at most the given number of bytes, which the buffer holds.
    let length = Errno::result(unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            dir.as_raw_fd(),
            list.as_mut_ptr(),
            LIST_BYTES,
        )
    })?;
    let bytes: Vec<u8> = list.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let length = usize::try_from(length).unwrap_or(0);
    Ok(only_dots(bytes.get(..length).unwrap_or_default()))
}

/// Whether the kernel's list (`struct linux_dirent64`: 8 bytes each of inode and offset, 2 of length, 1 of type, name)
/// names nothing but `.` and `..`.
fn only_dots(mut list: &[u8]) -> bool {
    /// Where an entry's length and its name begin.
    const LENGTH: usize = 16;
    const NAME: usize = 19;
    while let Some(length) = list.get(LENGTH..).and_then(<[u8]>::first_chunk) {
        let length = usize::from(u16::from_ne_bytes(*length)).max(NAME);
        let (entry, rest) = list.split_at(length.min(list.len()));
        let name = entry.get(NAME..).unwrap_or_default();
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        if name != b"." && name != b".." {
            return false;
        }
        list = rest;
    }
    true
}

/// Copies a directory with all below it. What the agent unpacked holds files, directories and links, not deeper than
/// [`trainyard_common::limits::MAX_TREE_DEPTH`].
fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    make_dir(to, 0o700)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_tree(&source, &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(std::fs::read_link(&source)?, &target)?;
        } else {
            std::fs::copy(&source, &target)?;
        }
    }
    let mode = from.symlink_metadata()?.mode();
    std::fs::set_permissions(to, Permissions::from_mode(mode & 0o7777))
}

#[cfg(test)]
mod tests {
    use trainyard_common::ids::BundleRef;

    use super::*;

    fn slot(root: &Path, template: Option<PathBuf>) -> SlotDirs {
        let bundle: BundleRef = "j1.b1".parse().unwrap();
        let dir = BundleDir::at(bundle, root.to_owned());
        for sub in ["slots", "tasks", "trash"] {
            std::fs::create_dir(root.join(sub)).unwrap();
        }
        SlotDirs::new(&dir, 0, None, template, start_cleaner().unwrap()).unwrap()
    }

    fn inodes(root: &Path) -> Vec<u64> {
        let names = ["work", "outputs", "checkpoint", "tmp"];
        let inode = |name: &str| root.join("slots/0").join(name).metadata().unwrap().ino();
        names.map(inode).to_vec()
    }

    #[test]
    fn what_is_clean_stays_and_what_is_not_is_moved_away() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path();
        let mut dirs = slot(root, None);
        dirs.prepare().unwrap();
        let first = inodes(root);
        // A number is not given again while its directory is open, also when the cleaner has deleted it.
        let open = |name| std::fs::File::open(root.join("slots/0").join(name)).unwrap();
        let _held = ["work", "outputs", "checkpoint", "tmp"].map(open);
        assert_eq!(dirs.collect(TaskIndex(0)), Left::default());
        dirs.prepare().unwrap();
        assert_eq!(inodes(root), first);
        // Seen by name, by rights and by identity.
        std::fs::write(root.join("slots/0/work/.hidden"), "x").unwrap();
        std::fs::set_permissions(root.join("slots/0/tmp"), Permissions::from_mode(0o500)).unwrap();
        std::fs::write(root.join("slots/0/checkpoint/step"), "7").unwrap();
        let left = dirs.collect(TaskIndex(1));
        assert_eq!((left.outputs, left.warning.as_str()), (true, ""));
        assert_eq!(
            std::fs::read(root.join("tasks/1/checkpoint/step")).unwrap(),
            b"7"
        );
        assert!(root.join("tasks/1/outputs").is_dir());
        dirs.prepare().unwrap();
        assert!(!root.join("slots/0/work/.hidden").exists());
        assert_eq!(
            root.join("slots/0/tmp").metadata().unwrap().mode() & 0o777,
            0o700
        );
        let again = inodes(root);
        assert!(again.iter().zip(&first).all(|(new, old)| new != old));

        std::fs::remove_dir(root.join("slots/0/tmp")).unwrap();
        std::os::unix::fs::symlink("/", root.join("slots/0/tmp")).unwrap();
        assert_eq!(dirs.collect(TaskIndex(2)), Left::default());
        dirs.prepare().unwrap();
        assert!(
            root.join("slots/0/tmp")
                .symlink_metadata()
                .unwrap()
                .is_dir()
        );
        assert!(!root.join("tasks/2").exists());
    }

    #[test]
    fn each_task_has_its_own_copy_of_the_snapshot() {
        let temp = tempfile::tempdir().unwrap();
        let template = temp.path().join("template");
        std::fs::create_dir_all(template.join("sub")).unwrap();
        std::fs::write(template.join("sub/run.sh"), "true").unwrap();
        std::fs::set_permissions(template.join("sub/run.sh"), Permissions::from_mode(0o755))
            .unwrap();
        std::os::unix::fs::symlink("sub/run.sh", template.join("link")).unwrap();
        let root = temp.path().join("bundle");
        std::fs::create_dir(&root).unwrap();
        let mut dirs = slot(&root, Some(template.clone()));
        let work = root.join("slots/0/work");
        for task in 0..2 {
            dirs.prepare().unwrap();
            assert_eq!(std::fs::read(work.join("link")).unwrap(), b"true");
            assert_eq!(
                work.join("sub/run.sh").metadata().unwrap().mode() & 0o777,
                0o755
            );
            std::fs::write(work.join("sub/run.sh"), "changed").unwrap();
            dirs.collect(TaskIndex(task));
        }
        assert_eq!(std::fs::read(template.join("sub/run.sh")).unwrap(), b"true");
    }
}
