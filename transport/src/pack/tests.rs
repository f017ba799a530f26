//! Packing of real directories.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use super::*;
use crate::tree::digest_of;

fn write(root: &Path, files: &[(&str, &str)]) {
    for (path, content) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
}

fn paths(packed: &Packed) -> Vec<&str> {
    packed
        .tree
        .entries()
        .iter()
        .map(|entry| entry.path.as_str())
        .collect()
}

fn find<'a>(packed: &'a Packed, path: &str) -> &'a EntryKind {
    &packed
        .tree
        .entries()
        .iter()
        .find(|entry| entry.path == path)
        .unwrap()
        .kind
}

fn snapshot(root: &Path) -> Result<Packed, PackError> {
    pack(root, &PackOptions::snapshot())
}

#[test]
fn files_directories_and_links_are_packed() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    write(
        root,
        &[
            ("train.py", "print(1)"),
            ("lib/a.py", "x"),
            ("lib/b.py", "x"),
            (".hidden", ""),
        ],
    );
    fs::create_dir(root.join("empty")).unwrap();
    fs::set_permissions(root.join("train.py"), fs::Permissions::from_mode(0o740)).unwrap();
    fs::set_permissions(root.join("lib/a.py"), fs::Permissions::from_mode(0o654)).unwrap();
    symlink("../train.py", root.join("lib/link")).unwrap();
    symlink("lib", root.join("to-lib")).unwrap();

    let packed = snapshot(root).unwrap();
    assert_eq!(
        paths(&packed),
        [
            ".hidden", "empty", "lib", "lib/a.py", "lib/b.py", "lib/link", "to-lib", "train.py"
        ]
    );
    let file = |content: &str, executable| {
        let digest = digest_of(content.as_bytes());
        EntryKind::File(TreeFile {
            digest,
            size: content.len() as u64,
            executable,
        })
    };
    assert_eq!(find(&packed, "train.py"), &file("print(1)", true));
    assert_eq!(find(&packed, "lib/a.py"), &file("x", false));
    assert_eq!(
        find(&packed, "lib/link"),
        &EntryKind::Symlink {
            target: "../train.py".into()
        }
    );
    assert_eq!(
        find(&packed, "to-lib"),
        &EntryKind::Symlink {
            target: "lib".into()
        }
    );
    assert_eq!(find(&packed, "empty"), &EntryKind::Directory);
    // Equal contents are one blob.
    let sizes: Vec<_> = packed.files.iter().map(|file| file.size).collect();
    assert_eq!(sizes, [0, 1, 8]);
    assert_eq!((packed.total_bytes, packed.tree.total_bytes()), (9, 10));
    assert_eq!(packed.skipped_count, 0);
}

#[test]
fn equal_directories_are_equal_trees() {
    let trees = [["b", "a"], ["a", "b"]].map(|order| {
        let dir = tempfile::tempdir().unwrap();
        for name in order {
            write(dir.path(), &[(name, name)]);
        }
        snapshot(dir.path()).unwrap().tree
    });
    assert_eq!(trees[0], trees[1]);
}

#[test]
fn ignore_files_count_without_a_repository() {
    let dir = tempfile::tempdir().unwrap();
    let outer = dir.path();
    let root = outer.join("project");
    write(
        outer,
        &[
            (".gitignore", "*.py\n"),
            ("project/.gitignore", "*.log\ndata/\nbuild\n"),
            ("project/.yardignore", "big.bin\n!keep.log\n"),
            ("project/.git/config", "x"),
            ("project/sub/.git", "gitdir: elsewhere"),
            ("project/.ignore", "main.py\n"),
            ("project/main.py", ""),
            ("project/a.log", ""),
            ("project/keep.log", ""),
            ("project/data/x", ""),
            ("project/sub/build/y", ""),
            ("project/sub/big.bin", ""),
            ("project/sub/.gitignore", "only-here\n"),
            ("project/sub/only-here", ""),
            ("project/sub/kept", ""),
            ("project/only-here", ""),
        ],
    );
    let packed = snapshot(&root).unwrap();
    assert_eq!(
        paths(&packed),
        [
            ".gitignore",
            ".ignore",
            ".yardignore",
            "keep.log",
            "main.py",
            "only-here",
            "sub",
            "sub/.gitignore",
            "sub/kept",
        ]
    );
    let all = pack(&root, &PackOptions::output()).unwrap();
    assert!(paths(&all).contains(&".git/config") && paths(&all).contains(&"data/x"));
}

#[test]
fn links_that_lead_out_are_named_with_the_remedy() {
    for target in ["/etc/passwd", "../outside", "sub/../x"] {
        let dir = tempfile::tempdir().unwrap();
        symlink(target, dir.path().join("link")).unwrap();
        let message = snapshot(dir.path()).unwrap_err().to_string();
        assert!(
            message.contains("\"link\"") && message.contains(target),
            "{message}"
        );
        assert!(message.contains(".yardignore"), "{message}");

        write(dir.path(), &[("kept", "1")]);
        let packed = pack(dir.path(), &PackOptions::output()).unwrap();
        assert_eq!(paths(&packed), ["kept"]);
        assert!(packed.skipped[0].contains("link"), "{:?}", packed.skipped);

        write(dir.path(), &[(".yardignore", "/link\n")]);
        assert_eq!(
            paths(&snapshot(dir.path()).unwrap()),
            [".yardignore", "kept"]
        );
    }
}

#[test]
fn a_link_to_a_directory_outside_is_not_entered() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &[("secret/key", "x"), ("root/a", "1")]);
    symlink(dir.path().join("secret"), dir.path().join("root/link")).unwrap();
    let packed = pack(&dir.path().join("root"), &PackOptions::output()).unwrap();
    assert_eq!(paths(&packed), ["a"]);
    assert_eq!(packed.skipped_count, 1);
}

#[test]
fn sockets_pipes_and_odd_names_are_refused_or_listed() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let _socket = UnixListener::bind(root.join("socket")).unwrap();
    nix::unistd::mkfifo(&root.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let odd = std::ffi::OsStr::from_bytes(b"odd\xff");
    fs::write(root.join(odd), "").unwrap();
    write(root, &[("good", "1")]);

    let packed = pack(root, &PackOptions::output()).unwrap();
    assert_eq!(paths(&packed), ["good"]);
    let skipped = packed.skipped.join("\n");
    for text in [
        "\"odd\u{fffd}\": it has a name that is not UTF-8",
        "is a socket",
        "is a pipe",
    ] {
        assert!(skipped.contains(text), "{skipped}");
    }
    for (name, reason) in [
        (odd, "UTF-8"),
        ("pipe".as_ref(), "pipe"),
        ("socket".as_ref(), "socket"),
    ] {
        let message = snapshot(root).unwrap_err().to_string();
        assert!(
            message.contains(reason) && message.contains(".yardignore"),
            "{message}"
        );
        fs::remove_file(root.join(name)).unwrap();
    }
    assert_eq!(paths(&snapshot(root).unwrap()), ["good"]);
}

#[test]
fn skipped_names_are_bounded_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    for n in 0..MAX_SKIPPED_NAMES + 5 {
        symlink("/", dir.path().join(n.to_string())).unwrap();
    }
    let packed = pack(dir.path(), &PackOptions::output()).unwrap();
    assert_eq!(packed.skipped.len(), MAX_SKIPPED_NAMES);
    assert_eq!(packed.skipped_count, MAX_SKIPPED_NAMES + 5);
}

#[test]
fn attack_f02_limits_name_themselves_and_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &[("a", "12345"), ("b", "12345")]);
    let mut options = PackOptions::snapshot();
    options.limits.entries = 2;
    options.limits.bytes = 10;
    pack(dir.path(), &options).unwrap();
    options.limits.bytes = 9;
    let error = pack(dir.path(), &options).unwrap_err();
    assert!(matches!(
        error,
        PackError::Invalid(InvalidTree::TooManyBytes { limit: 9 })
    ));
    assert!(error.to_string().contains(".yardignore"));
    options.limits.entries = 1;
    options.limits.bytes = 10;
    let error = pack(dir.path(), &options).unwrap_err();
    assert!(matches!(
        error,
        PackError::Invalid(InvalidTree::TooManyEntries { limit: 1 })
    ));
    assert!(error.to_string().contains(".yardignore"));

    // 8 EiB without using any: refused by its size, before it is read.
    let sparse = File::create(dir.path().join("sparse")).unwrap();
    if sparse.set_len(1 << 41).is_ok() {
        let error = snapshot(dir.path()).unwrap_err();
        assert!(matches!(
            error,
            PackError::Invalid(InvalidTree::TooManyBytes { .. })
        ));
    }
}

#[test]
fn deep_and_missing_roots_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        snapshot(&dir.path().join("no")),
        Err(PackError::Root { .. })
    ));
    write(dir.path(), &[("file", "")]);
    assert!(matches!(
        snapshot(&dir.path().join("file")),
        Err(PackError::Root { .. })
    ));
    let deep = vec!["d"; 129].join("/");
    fs::create_dir_all(dir.path().join(deep)).unwrap();
    assert!(matches!(
        snapshot(dir.path()),
        Err(PackError::Invalid(InvalidTree::BadPath { .. }))
    ));
    let packed = pack(dir.path(), &PackOptions::output()).unwrap();
    assert_eq!(
        packed.tree.entries().len(),
        129,
        "the file and the first 128 directories"
    );
    assert!(
        packed.skipped[0].contains("128 components"),
        "{:?}",
        packed.skipped
    );
}

#[test]
fn only_regular_files_are_opened() {
    let dir = tempfile::tempdir().unwrap();
    nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("pipe", dir.path().join("link")).unwrap();
    for name in ["pipe", "link", "", "none"] {
        assert!(open_regular(&dir.path().join(name)).is_err(), "{name}");
    }
}

#[test]
fn hashing_stops_behind_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &[("a", "123456")]);
    let path = dir.path().join("a");
    assert_eq!(
        hash_file(&path, 100).unwrap(),
        (digest_of(b"123456"), 6, false)
    );
    assert_eq!(hash_file(&path, 3).unwrap().1, 4);
}
