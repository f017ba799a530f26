//! The store of blobs: what lies about its size or hash is refused.

use super::*;

fn digest(data: &[u8]) -> Digest {
    Digest(*blake3::hash(data).as_bytes())
}

fn put(
    store: &BlobStore,
    as_digest: Digest,
    size: u64,
    parts: &[&[u8]],
) -> Result<bool, BlobError> {
    let mut receiving = store.receive(as_digest, size)?;
    for part in parts {
        receiving.write(part)?;
    }
    let mut touched = BTreeSet::new();
    let new = store.finish(receiving, &mut touched)?;
    store.sync(&touched)?;
    Ok(new)
}

fn partials(dir: &Path) -> usize {
    fs::read_dir(dir.join("blobs/partial")).unwrap().count()
}

#[test]
fn a_blob_comes_back_as_it_was_sent() {
    let dir = tempfile::tempdir().unwrap();
    let store = BlobStore::open(dir.path().join("blobs")).unwrap();
    let id = digest(b"hello world");
    assert!(!store.contains(id));
    assert!(put(&store, id, 11, &[b"hello ", b"world"]).unwrap());
    assert!(
        !put(&store, id, 11, &[b"hello world"]).unwrap(),
        "a second upload is not new"
    );
    assert!(store.contains(id));
    assert_eq!(
        store.reader(id, 0).unwrap().next_chunk().unwrap(),
        b"hello world"
    );
    let mut tail = store.reader(id, 6).unwrap();
    assert_eq!(
        (tail.size(), tail.next_chunk().unwrap()),
        (11, b"world".to_vec())
    );
    assert_eq!(tail.next_chunk().unwrap(), b"");
    assert!(matches!(
        store.reader(id, 12),
        Err(BlobError::Offset { .. })
    ));
    assert!(matches!(
        store.reader(digest(b"x"), 0),
        Err(BlobError::NotFound(_))
    ));
    assert!(put(&store, digest(b""), 0, &[]).unwrap());
}

#[test]
fn lies_about_size_and_hash_are_refused_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = BlobStore::open(dir.path().join("blobs")).unwrap();
    let id = digest(b"true");
    assert!(matches!(
        put(&store, id, 4, &[b"lies"]),
        Err(BlobError::Digest { .. })
    ));
    assert!(matches!(
        put(&store, id, 3, &[b"true"]),
        Err(BlobError::Size { .. })
    ));
    assert!(matches!(
        put(&store, id, 5, &[b"true"]),
        Err(BlobError::Size { .. })
    ));
    assert!(matches!(
        put(&store, id, u64::MAX, &[]),
        Err(BlobError::TooLarge(_))
    ));
    assert!(!store.contains(id));
    assert_eq!(partials(dir.path()), 0);
    put(&store, id, 4, &[b"true"]).unwrap();
    assert!(matches!(
        put(&store, id, 4, &[b"lies"]),
        Err(BlobError::Digest { .. })
    ));
    assert_eq!(store.reader(id, 0).unwrap().next_chunk().unwrap(), b"true");
}

#[test]
fn uploads_of_one_blob_may_overlap_and_leftovers_are_cleared_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let store = BlobStore::open(dir.path().join("blobs")).unwrap();
    let id = digest(b"same");
    let mut both = [store.receive(id, 4).unwrap(), store.receive(id, 4).unwrap()];
    both.iter_mut()
        .for_each(|receiving| receiving.write(b"same").unwrap());
    assert_eq!(partials(dir.path()), 2);
    for receiving in both {
        store.finish(receiving, &mut BTreeSet::new()).unwrap();
    }
    assert_eq!(partials(dir.path()), 0);
    fs::write(dir.path().join("blobs/partial/0"), "left").unwrap();
    let store = BlobStore::open(dir.path().join("blobs")).unwrap();
    assert_eq!(partials(dir.path()), 0);
    assert!(store.contains(id));
}
