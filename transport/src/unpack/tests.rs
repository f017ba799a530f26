//! Unpacking of honest and hostile trees into real directories.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;
use crate::pack::{PackOptions, pack};
use crate::tree::{TreeEntry, digest_of};

/// Blobs by digest.
type Store = HashMap<Digest, Vec<u8>>;

fn source(store: &Store) -> impl FnMut(&Digest) -> io::Result<io::Cursor<Vec<u8>>> {
    |digest| match store.get(digest) {
        Some(content) => Ok(io::Cursor::new(content.clone())),
        None => Err(io::ErrorKind::NotFound.into()),
    }
}

fn file(store: &mut Store, path: &str, content: &str) -> TreeEntry {
    let digest = digest_of(content.as_bytes());
    store.insert(digest, content.into());
    let file = TreeFile {
        digest,
        size: content.len() as u64,
        executable: path.ends_with(".sh"),
    };
    TreeEntry {
        path: path.to_owned(),
        kind: EntryKind::File(file),
    }
}

fn link(path: &str, target: &str) -> TreeEntry {
    TreeEntry {
        path: path.to_owned(),
        kind: EntryKind::Symlink {
            target: target.to_owned(),
        },
    }
}

fn dir(path: &str) -> TreeEntry {
    TreeEntry {
        path: path.to_owned(),
        kind: EntryKind::Directory,
    }
}

fn sample(store: &mut Store) -> Tree {
    let entries = vec![
        file(store, "a/b/c", "deep"),
        file(store, "run.sh", "#!/bin/sh"),
        file(store, "a-x", ""),
        dir("empty/inner"),
        link("a/up", "../run.sh"),
        link("to-a", "a"),
    ];
    Tree::new(entries).unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_packed_directory_comes_back_the_same() {
    let mut store = Store::new();
    let tree = sample(&mut store);
    let temp = tempfile::tempdir().unwrap();
    let dest = temp.path().join("dest");
    unpack(&tree, &dest, source(&store)).unwrap();

    assert_eq!(fs::read_to_string(dest.join("to-a/b/c")).unwrap(), "deep");
    assert_eq!(
        fs::read_link(dest.join("a/up")).unwrap(),
        Path::new("../run.sh")
    );
    assert_eq!(
        fs::metadata(dest.join("run.sh"))
            .unwrap()
            .permissions()
            .mode()
            & 0o111,
        0o111
    );
    assert_eq!(
        fs::metadata(dest.join("a-x")).unwrap().permissions().mode() & 0o111,
        0
    );

    let packed = pack(&dest, &PackOptions::snapshot()).unwrap();
    let without_dirs = |tree: &Tree| -> Vec<TreeEntry> {
        let entries = tree.entries().iter();
        entries
            .filter(|entry| entry.kind != EntryKind::Directory)
            .cloned()
            .collect()
    };
    assert_eq!(without_dirs(&packed.tree), without_dirs(&tree));
    assert!(dest.join("empty/inner").is_dir());
}

#[test]
fn the_destination_must_be_new_or_empty() {
    let mut store = Store::new();
    let tree = sample(&mut store);
    let temp = tempfile::tempdir().unwrap();
    unpack(&tree, temp.path(), source(&store)).unwrap();
    let before = names(temp.path());
    let error = unpack(&tree, temp.path(), source(&store)).unwrap_err();
    assert!(matches!(error, UnpackError::NotEmpty { .. }), "{error:?}");
    assert_eq!(names(temp.path()), before, "a refusal removes nothing");
    let error = unpack(&tree, &temp.path().join("no/dest"), source(&store)).unwrap_err();
    assert!(
        matches!(error, UnpackError::Destination { .. }),
        "{error:?}"
    );
    let error = unpack(&tree, &temp.path().join("run.sh"), source(&store)).unwrap_err();
    assert!(
        matches!(error, UnpackError::Destination { .. }),
        "{error:?}"
    );
}

/// What unpacking says of a tree with one file whose blob is `content`.
fn lie(size: u64, content: &'static [u8]) -> UnpackError {
    let kind = EntryKind::File(TreeFile {
        digest: digest_of(b"12345"),
        size,
        executable: false,
    });
    let mut store = Store::new();
    let entries = vec![
        file(&mut store, "a/first", "x"),
        TreeEntry {
            path: "b".into(),
            kind,
        },
    ];
    let tree = Tree::new(entries).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let dest = temp.path().join("dest");
    let result = unpack(&tree, &dest, |digest| {
        Ok(store.get(digest).map_or(content, Vec::as_slice))
    });
    assert!(!dest.exists(), "the partial tree is removed");
    result.unwrap_err()
}

#[test]
fn attack_f02_lies_about_size_or_digest_are_noticed_and_leave_nothing() {
    let what = |error| match error {
        UnpackError::Damaged { what, path, .. } => (what, path),
        other => panic!("{other:?}"),
    };
    let b = || "b".to_owned();
    assert_eq!(what(lie(4, b"12345")), ("size", b()));
    assert_eq!(what(lie(6, b"12345")), ("size", b()));
    assert_eq!(
        what(lie(1 << 39, b"12345")),
        ("size", b()),
        "the size is not allocated"
    );
    assert_eq!(what(lie(0, b"12345")), ("size", b()));
    assert_eq!(what(lie(5, b"12346")), ("hash", b()));
}

#[test]
fn attack_f02_an_endless_source_ends_behind_the_announced_size() {
    let kind = EntryKind::File(TreeFile {
        digest: Digest([0; 32]),
        size: 1000,
        executable: false,
    });
    let tree = Tree::new(vec![TreeEntry {
        path: "a".into(),
        kind,
    }])
    .unwrap();
    let temp = tempfile::tempdir().unwrap();
    let error = unpack(&tree, temp.path(), |_| Ok(io::repeat(0))).unwrap_err();
    assert!(
        matches!(error, UnpackError::Damaged { what: "size", .. }),
        "{error:?}"
    );
    assert!(
        names(temp.path()).is_empty(),
        "the given directory stays, empty"
    );
}

#[test]
fn a_missing_blob_leaves_nothing() {
    let mut store = Store::new();
    let tree = sample(&mut store);
    store.remove(&digest_of(b"#!/bin/sh"));
    let temp = tempfile::tempdir().unwrap();
    let dest = temp.path().join("dest");
    let error = unpack(&tree, &dest, source(&store)).unwrap_err();
    assert!(
        matches!(&error, UnpackError::Source { path, .. } if path == "run.sh"),
        "{error:?}"
    );
    assert!(!dest.exists());
}

/// Unpacks while somebody replaces things in the destination: `plant` runs when the blob of `at` is asked for.
fn with_planted(entries: Vec<TreeEntry>, store: &Store, at: &str, plant: impl Fn(&Path, &Path)) {
    let tree = Tree::new(entries).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let (dest, outside) = (temp.path().join("dest"), temp.path().join("outside"));
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("precious"), "old").unwrap();
    let trigger = digest_of(at.as_bytes());
    let mut read = source(store);
    let result = unpack(&tree, &dest, |digest| {
        if *digest == trigger {
            plant(&dest, &outside);
        }
        read(digest)
    });
    result.unwrap_err();
    assert_eq!(names(&outside), ["precious"]);
    assert_eq!(fs::read_to_string(outside.join("precious")).unwrap(), "old");
    assert!(!dest.exists());
}

#[test]
fn attack_f01_planted_links_are_not_followed() {
    let mut store = Store::new();
    let entries = vec![
        file(&mut store, "a", "1"),
        file(&mut store, "d/new", "3"),
        file(&mut store, "d/precious", "2"),
    ];
    // A link where a directory is to be made.
    with_planted(entries.clone(), &store, "1", |dest, outside| {
        symlink(outside, dest.join("d")).unwrap();
    });
    // A link where a file is to be made.
    with_planted(entries, &store, "2", |dest, outside| {
        let _ = fs::create_dir(dest.join("d"));
        symlink(outside.join("precious"), dest.join("d/precious")).unwrap();
    });
    // A file where a link is to be made.
    let entries = vec![file(&mut store, "a", "1"), link("z", "a")];
    with_planted(entries, &store, "1", |dest, _| {
        fs::write(dest.join("z"), "").unwrap()
    });
}

#[test]
fn unpacking_over_replaces_files_and_keeps_the_rest() {
    let mut store = Store::new();
    let tree = sample(&mut store);
    let temp = tempfile::tempdir().unwrap();
    let dest = temp.path().join("new/dest");
    unpack_over(&tree, &dest, source(&store)).unwrap();
    fs::write(dest.join("run.sh"), "changed").unwrap();
    fs::write(dest.join("mine"), "mine").unwrap();
    fs::remove_file(dest.join("to-a")).unwrap();
    symlink("mine", dest.join("to-a")).unwrap();
    unpack_over(&tree, &dest, source(&store)).unwrap();
    assert_eq!(
        fs::read_to_string(dest.join("run.sh")).unwrap(),
        "#!/bin/sh"
    );
    assert_eq!(fs::read_to_string(dest.join("mine")).unwrap(), "mine");
    assert_eq!(fs::read_link(dest.join("to-a")).unwrap(), Path::new("a"));
    assert_eq!(
        names(&dest),
        ["a", "a-x", "empty", "mine", "run.sh", "to-a"]
    );
}

#[test]
fn attack_f05_unpacking_over_follows_no_link_and_replaces_no_directory() {
    let mut store = Store::new();
    let tree = Tree::new(vec![file(&mut store, "a/b", "new"), link("l", "a")]).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let outside = temp.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("b"), "old").unwrap();
    let try_over = |prepare: &dyn Fn(&Path)| {
        let dest = tempfile::tempdir_in(temp.path()).unwrap();
        prepare(dest.path());
        let result = unpack_over(&tree, dest.path(), source(&store));
        assert_eq!(fs::read_to_string(outside.join("b")).unwrap(), "old");
        let left = names(dest.path());
        assert!(!left.iter().any(|name| name.ends_with(".tmp")), "{left:?}");
        (result, dest)
    };
    let in_the_way = |result: Result<(), UnpackError>| {
        assert!(
            matches!(result, Err(UnpackError::InTheWay { .. })),
            "{result:?}"
        );
    };
    in_the_way(try_over(&|dest| symlink(&outside, dest.join("a")).unwrap()).0);
    in_the_way(try_over(&|dest| fs::write(dest.join("a"), "").unwrap()).0);
    in_the_way(try_over(&|dest| fs::create_dir_all(dest.join("a/b")).unwrap()).0);
    in_the_way(try_over(&|dest| fs::create_dir(dest.join("l")).unwrap()).0);
    // A link in a file's place is replaced itself.
    let (result, dest) = try_over(&|dest| {
        fs::create_dir(dest.join("a")).unwrap();
        symlink(outside.join("b"), dest.join("a/b")).unwrap();
    });
    result.unwrap();
    assert!(
        fs::symlink_metadata(dest.path().join("a/b"))
            .unwrap()
            .is_file()
    );
}

#[test]
fn a_failed_file_keeps_the_old_one() {
    let mut store = Store::new();
    let tree = Tree::new(vec![file(&mut store, "a", "new")]).unwrap();
    let temp = tempfile::tempdir().unwrap();
    fs::write(temp.path().join("a"), "old").unwrap();
    unpack_over(&tree, temp.path(), |_| Ok(&b"neW"[..])).unwrap_err();
    assert_eq!(fs::read_to_string(temp.path().join("a")).unwrap(), "old");
    assert_eq!(names(temp.path()), ["a"]);
}
