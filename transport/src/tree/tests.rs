//! Validity of trees. Row F of the attack list is named `attack_…`.

use proptest::prelude::*;

use super::*;

fn file(path: &str, size: u64) -> TreeEntry {
    let file = TreeFile {
        digest: Digest([7; 32]),
        size,
        executable: size == 1,
    };
    TreeEntry {
        path: path.to_owned(),
        kind: EntryKind::File(file),
    }
}

fn dir(path: &str) -> TreeEntry {
    TreeEntry {
        path: path.to_owned(),
        kind: EntryKind::Directory,
    }
}

fn link(path: &str, target: &str) -> TreeEntry {
    let kind = EntryKind::Symlink {
        target: target.to_owned(),
    };
    TreeEntry {
        path: path.to_owned(),
        kind,
    }
}

/// A manifest as an attacker would write it: unchecked, in the order given.
fn wire(entries: &[TreeEntry]) -> Vec<u8> {
    let entries = entries.iter().map(entry_to_wire).collect();
    v1::Manifest {
        version: 1,
        entries,
    }
    .encode_to_vec()
}

fn refuse(entries: &[TreeEntry]) -> InvalidTree {
    Tree::decode(&wire(entries)).unwrap_err()
}

fn refuse_path(path: &str) -> PathRule {
    match refuse(&[file(path, 0)]) {
        InvalidTree::BadPath { rule, .. } => rule,
        other => panic!("{path:?}: {other:?}"),
    }
}

#[test]
fn a_tree_survives_its_manifest() {
    let entries = vec![
        link("z", "a/b"),
        file("a/b", 1),
        dir("a/empty"),
        file("a-b", 5),
        link("a/up", "../a-b"),
        file("A", 2),
        file("tab\tnew\nline", 3),
    ];
    let tree = Tree::new(entries).unwrap();
    let bytes = tree.encode();
    assert_eq!(Tree::decode(&bytes), Ok(tree.clone()));
    assert_eq!(tree.id(), digest_of(&bytes));
    assert_eq!(tree.total_bytes(), 11);
    assert_eq!(tree.files().count(), 4);
    let paths: Vec<_> = tree
        .entries()
        .iter()
        .map(|entry| entry.path.as_str())
        .collect();
    assert!(paths.is_sorted(), "{paths:?}");
    let empty = Tree::new(Vec::new()).unwrap();
    assert_eq!(Tree::decode(&empty.encode()), Ok(empty));
}

#[test]
fn attack_f01_paths_that_lead_elsewhere_are_refused() {
    assert_eq!(refuse_path(""), PathRule::Empty);
    assert_eq!(refuse_path("/etc/passwd"), PathRule::Absolute);
    for path in ["..", "../x", "a/..", "a/../b", ".", "./a", "a/."] {
        assert_eq!(refuse_path(path), PathRule::Dots, "{path}");
    }
    for path in ["a//b", "a/"] {
        assert_eq!(refuse_path(path), PathRule::EmptyComponent, "{path}");
    }
    assert_eq!(refuse_path("a\0b"), PathRule::Nul);
    assert!(Tree::decode(&wire(&[file("...", 0), file("..a", 0), file("a..", 0)])).is_ok());
}

#[test]
fn attack_f04_names_are_bounded_and_distinct() {
    assert_eq!(refuse_path(&"n".repeat(300)), PathRule::LongComponent);
    assert_eq!(
        refuse_path(&format!("a/{}", "é".repeat(128))),
        PathRule::LongComponent
    );
    assert_eq!(refuse_path(&"a/".repeat(3000)), PathRule::TooLong);
    assert_eq!(refuse_path(&["a"; 129].join("/")), PathRule::TooDeep);
    let largest = vec!["b".repeat(255); 16].join("/");
    let deepest = ["a"; 128].join("/");
    let names = ["A", &deepest, &largest, "e\u{301}", "trailing.", "é"].map(|p| file(p, 0));
    assert_eq!(Tree::decode(&wire(&names)).unwrap().entries().len(), 6);
}

#[test]
fn duplicates_and_disorder_are_refused() {
    let order = |path: &str| InvalidTree::Order {
        path: path.to_owned(),
    };
    assert_eq!(refuse(&[file("a", 0), file("a", 0)]), order("a"));
    assert_eq!(refuse(&[file("a", 0), link("a", "b")]), order("a"));
    assert_eq!(refuse(&[file("b", 0), file("a", 0)]), order("a"));
    assert_eq!(Tree::new(vec![dir("a"), dir("a")]), Err(order("a")));
}

#[test]
fn nothing_lies_below_a_file_or_link() {
    for parent in [file("a", 0), link("a", "b")] {
        // `a-` sorts between `a` and `a/…`, so looking at the neighbour is not enough.
        for path in ["a/b", "a/b/c"] {
            let entries = [parent.clone(), file("a-", 0), file(path, 0)];
            let expected = InvalidTree::ParentNotDirectory {
                path: path.into(),
                parent: "a".into(),
            };
            assert_eq!(refuse(&entries), expected);
        }
    }
    assert!(Tree::decode(&wire(&[dir("a"), file("a-", 0), file("a/b", 0)])).is_ok());
}

#[test]
fn attack_f03_links_that_may_lead_out_are_refused() {
    let rule = |path: &str, target: &str| match refuse(&[link(path, target)]) {
        InvalidTree::BadSymlink { rule, .. } => rule,
        other => panic!("{other:?}"),
    };
    assert_eq!(rule("a", ""), SymlinkRule::Unusable);
    assert_eq!(rule("a", "b\0"), SymlinkRule::Unusable);
    assert_eq!(rule("a", &"x".repeat(256)), SymlinkRule::Unusable);
    assert_eq!(rule("a", "/etc"), SymlinkRule::Absolute);
    assert_eq!(rule("a", ".."), SymlinkRule::Escapes);
    assert_eq!(rule("a/b", "../.."), SymlinkRule::Escapes);
    assert_eq!(rule("a/b", ".././/../x"), SymlinkRule::Escapes);
    // Through a/b/up -> ../.. this one would be the directory above the root.
    assert_eq!(rule("x", "a/b/up/.."), SymlinkRule::InnerDots);
    for (path, target) in [
        ("a", "b"),
        ("a", "a"),
        ("a", "."),
        ("a/b", ".."),
        ("a/b/c", "../../d/e/"),
    ] {
        assert!(
            Tree::decode(&wire(&[link(path, target)])).is_ok(),
            "{path} -> {target}"
        );
    }
}

#[test]
fn attack_f02_too_many_entries_or_bytes_are_refused_before_memory_is_used() {
    let limit = limits::MAX_TREE_ENTRIES;
    // 40 MB of empty entries: 20 million of them.
    let bomb = [0x12, 0].repeat(20_000_000);
    assert_eq!(
        Tree::decode(&bomb),
        Err(InvalidTree::TooManyEntries { limit })
    );
    let limit = limits::MAX_TREE_BYTES;
    let too_large = InvalidTree::TooManyBytes { limit };
    assert_eq!(refuse(&[file("a", 8 << 60)]), too_large);
    assert_eq!(refuse(&[file("a", limit), file("b", 1)]), too_large);
    assert_eq!(
        refuse(&[file("a", u64::MAX), file("b", u64::MAX)]),
        too_large
    );
    assert!(Tree::decode(&wire(&[file("a", limit)])).is_ok());
    let large = vec![0; limits::MAX_MANIFEST_BYTES as usize + 1];
    assert_eq!(Tree::decode(&large), Err(InvalidTree::ManifestTooLarge));
    let many = (0..=limits::MAX_TREE_ENTRIES)
        .map(|n| dir(&n.to_string()))
        .collect();
    assert!(matches!(
        Tree::new(many),
        Err(InvalidTree::TooManyEntries { .. })
    ));
}

#[test]
fn malformed_manifests_are_refused() {
    let good = wire(&[file("a", 3)]);
    for end in 1..good.len() {
        assert!(Tree::decode(&good[..end]).is_err() || end == 2, "{end}");
    }
    assert_eq!(Tree::decode(&[]), Err(InvalidTree::Version { found: 0 }));
    assert_eq!(
        Tree::decode(&[8, 2]),
        Err(InvalidTree::Version { found: 2 })
    );
    assert_eq!(Tree::decode(b"hello"), Err(InvalidTree::Malformed));
    let kindless = v1::TreeEntry {
        path: "a".into(),
        kind: None,
    };
    let manifest = v1::Manifest {
        version: 1,
        entries: vec![kindless],
    };
    let no_kind = InvalidTree::NoKind { path: "a".into() };
    assert_eq!(Tree::decode(&manifest.encode_to_vec()), Err(no_kind));
    let short = v1::TreeFile {
        digest: vec![1; 31],
        size: 0,
        executable: false,
    };
    let kind = Some(v1::tree_entry::Kind::File(short));
    let entries = vec![v1::TreeEntry {
        path: "a".into(),
        kind,
    }];
    let bad_digest = InvalidTree::BadDigest { path: "a".into() };
    let manifest = v1::Manifest {
        version: 1,
        entries,
    };
    assert_eq!(Tree::decode(&manifest.encode_to_vec()), Err(bad_digest));
}

/// Where the kernel would end up, starting in the root, counting levels; `None` above the root.
fn resolve(tree: &Tree, start: &str, budget: &mut u32) -> Option<Vec<String>> {
    let mut at: Vec<String> = Vec::new();
    let mut todo: Vec<String> = start.split('/').rev().map(str::to_owned).collect();
    while let Some(component) = todo.pop() {
        *budget = budget.checked_sub(1)?;
        match component.as_str() {
            "" | "." => {}
            ".." => drop(at.pop()?),
            name => {
                at.push(name.to_owned());
                let path = at.join("/");
                let entry = tree.entries().iter().find(|entry| entry.path == path);
                if let Some(EntryKind::Symlink { target }) = entry.map(|entry| &entry.kind) {
                    at.pop();
                    todo.extend(target.split('/').rev().map(str::to_owned));
                }
            }
        }
    }
    Some(at)
}

fn component() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["a", "b", "c", "..", ".", ""]).prop_map(str::to_owned)
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(component(), 1..5).prop_map(|components| components.join("/"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn no_link_of_a_valid_tree_leads_out_of_it(
        links in prop::collection::vec((path(), path()), 1..5),
    ) {
        let entries: Vec<_> = links.iter().map(|(path, target)| link(path, target)).collect();
        let Ok(tree) = Tree::new(entries) else { return Ok(()) };
        for entry in tree.entries() {
            let mut budget = 200;
            let end = resolve(&tree, &entry.path, &mut budget);
            // Out of budget: a loop, which the kernel refuses to follow.
            prop_assert!(end.is_some() || budget == 0, "{:?} in {:?}", entry, tree);
        }
    }

    #[test]
    fn valid_paths_are_exactly_the_normal_relative_ones(path in "[a./\\\\é\0]{0,12}") {
        let valid = Tree::new(vec![file(&path, 0)]).is_ok();
        let normal = !path.is_empty()
            && !path.contains('\0')
            && path.split('/').all(|c| !matches!(c, "" | "." | ".."));
        prop_assert_eq!(valid, normal);
    }

    #[test]
    fn trees_survive_their_manifests(
        names in prop::collection::btree_set("[a-z]{1,3}(/[a-z]{1,3}){0,3}", 0..20),
        sizes: [u16; 20],
    ) {
        let entries = names.iter().zip(sizes).map(|(name, size)| match size % 3 {
            0 => dir(name),
            1 => link(name, "x"),
            _ => file(name, size.into()),
        });
        let Ok(tree) = Tree::new(entries.collect()) else { return Ok(()) };
        prop_assert_eq!(Tree::decode(&tree.encode()), Ok(tree));
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        let _ = Tree::decode(&bytes);
    }
}
