//! The client's side against a service in memory, over real TLS, with faults.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Streaming};
use trainyard_proto::v1::blob_service_server::{BlobService, BlobServiceServer};

use super::*;
use crate::client::{ConnectError, connect, connect_error};
use crate::connections::{Connections, Peer};
use crate::pack::{PackOptions, pack};
use crate::task::{AbortOnDrop, spawn};
use crate::testing::{Cluster, Server, node, soon};
use crate::tree::digest_of;
use crate::unpack::unpack;

/// What the service does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// The first download loses its connection after a chunk.
    CutOnce,
    /// Every download loses its connection before anything came.
    CutAlways,
    /// One byte of each download is wrong.
    Flip,
    /// A download has more bytes than announced.
    Overlong,
    /// A download ends early.
    Short,
    /// Nobody may do anything.
    Deny,
    /// Blobs are missing that nobody asked for.
    Invent,
}

/// A coordinator's blobs, in memory.
struct Blobs {
    stored: Mutex<BTreeMap<Digest, Vec<u8>>>,
    fault: Fault,
    connections: Connections,
    peers: Mutex<Vec<Peer>>,
    uploads: AtomicUsize,
    offsets: Mutex<Vec<u64>>,
}

type Answer<T> = Result<Response<T>, Status>;

#[derive(Clone)]
struct Service(Arc<Blobs>);

#[tonic::async_trait]
impl BlobService for Service {
    async fn missing(&self, request: Request<v1::MissingRequest>) -> Answer<v1::MissingResponse> {
        self.0
            .peers
            .lock()
            .unwrap()
            .push(request.extensions().get::<Peer>().unwrap().clone());
        if self.0.fault == Fault::Deny {
            return Err(Status::permission_denied("not yours"));
        }
        let mut digests = request.into_inner().digests;
        assert!(digests.len() <= MISSING_BATCH);
        let stored = self.0.stored.lock().unwrap();
        digests.retain(|digest| !stored.contains_key(&Digest::try_from(&digest[..]).unwrap()));
        if self.0.fault == Fault::Invent {
            digests.push(vec![9; 32]);
        }
        Ok(Response::new(v1::MissingResponse { digests }))
    }

    async fn upload(
        &self,
        request: Request<Streaming<v1::UploadRequest>>,
    ) -> Answer<v1::UploadResponse> {
        self.0.uploads.fetch_add(1, Ordering::Relaxed);
        let mut stream = request.into_inner();
        let mut blobs: Vec<(v1::BlobHeader, Vec<u8>)> = Vec::new();
        while let Some(message) = stream.message().await? {
            match message.part.unwrap() {
                Part::Header(header) => blobs.push((header, Vec::new())),
                Part::Data(data) => {
                    assert!(data.len() <= CHUNK_BYTES);
                    blobs.last_mut().unwrap().1.extend(data);
                }
            }
        }
        let stored = blobs.len() as u32;
        for (header, data) in blobs {
            let digest = digest_of(&data);
            if header.size != data.len() as u64 || header.digest != digest.0 {
                return Err(Status::invalid_argument("size or digest is wrong"));
            }
            self.0.stored.lock().unwrap().insert(digest, data);
        }
        Ok(Response::new(v1::UploadResponse { stored }))
    }

    type DownloadStream = ReceiverStream<Result<v1::DownloadResponse, Status>>;

    async fn download(
        &self,
        request: Request<v1::DownloadRequest>,
    ) -> Answer<Self::DownloadStream> {
        let v1::DownloadRequest { digest, offset } = request.into_inner();
        let digest = Digest::try_from(&digest[..]).unwrap();
        let mut data = self.0.stored.lock().unwrap().get(&digest).cloned();
        let data = data
            .as_mut()
            .ok_or_else(|| Status::not_found("no such blob"))?;
        let size = data.len() as u64;
        let first = {
            let mut offsets = self.0.offsets.lock().unwrap();
            offsets.push(offset);
            offsets.len() == 1
        };
        let fault = self.0.fault;
        let mut data = data.split_off(offset as usize);
        match fault {
            Fault::Flip => data[0] ^= 1,
            Fault::Overlong => data.push(0),
            Fault::Short => drop(data.pop()),
            _ => {}
        }
        let (sender, receiver) = mpsc::channel(1);
        let connections = self.0.connections.clone();
        spawn("download", async move {
            if fault == Fault::CutAlways {
                connections.close_where(|_| true);
                return sender.closed().await;
            }
            for chunk in data.chunks(CHUNK_BYTES) {
                let message = v1::DownloadResponse {
                    data: chunk.to_vec(),
                    size,
                };
                if sender.send(Ok(message)).await.is_err() {
                    return;
                }
                if fault == Fault::CutOnce && first {
                    // The receiver takes the second chunk only when the first is on its way.
                    let _ = sender.reserve().await;
                    connections.close_where(|_| true);
                    return sender.closed().await;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

struct Fixture {
    blobs: Arc<Blobs>,
    channel: Channel,
    temp: tempfile::TempDir,
    server: AbortOnDrop,
}

impl Fixture {
    async fn new(fault: Fault) -> Self {
        let cluster = Cluster::new();
        let Server {
            endpoint,
            incoming,
            connections,
        } = cluster.serve().await;
        let blobs = Arc::new(Blobs {
            stored: Mutex::default(),
            fault,
            connections,
            peers: Mutex::default(),
            uploads: AtomicUsize::new(0),
            offsets: Mutex::default(),
        });
        let service = BlobServiceServer::new(Service(blobs.clone()));
        let serve = tonic::transport::Server::builder().add_service(service);
        let server = AbortOnDrop(spawn("server", async move {
            serve.serve_with_incoming(incoming).await.unwrap()
        }));
        let client = cluster.client(&node(7));
        let channel = soon(
            "a channel",
            connect(&[endpoint], &cluster.trust(), Some(&client)),
        )
        .await
        .unwrap();
        Self {
            blobs,
            channel,
            temp: tempfile::tempdir().unwrap(),
            server,
        }
    }

    fn pack(&self, files: &[(&str, Vec<u8>)]) -> Packed {
        let root = self.temp.path().join("source");
        for (path, content) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        pack(&root, &PackOptions::snapshot()).unwrap()
    }

    fn store(&self, data: Vec<u8>) -> Digest {
        let digest = digest_of(&data);
        self.blobs.stored.lock().unwrap().insert(digest, data);
        digest
    }

    async fn upload(&self, packed: &Packed) -> (Result<Digest, BlobError>, Vec<Progress>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let report = seen.clone();
        let progress = move |progress| report.lock().unwrap().push(progress);
        let result = soon("the upload", upload_tree(&self.channel, packed, progress)).await;
        let seen = std::mem::take(&mut *seen.lock().unwrap());
        (result, seen)
    }

    /// The result of downloading some 300 kB, and what is in the directory then.
    async fn download(&self, max_bytes: u64) -> (Result<u64, BlobError>, Vec<String>) {
        let digest = self.store(sample(600_000));
        let dir = self.temp.path().join("dest");
        fs::create_dir_all(&dir).unwrap();
        let dest = dir.join("blob");
        let download = download_blob(&self.channel, digest, max_bytes, &dest);
        let result = soon("the download", download).await;
        let names = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap());
        (result, names.collect())
    }
}

fn sample(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|n| (n % 251) as u8).collect()
}

#[tokio::test]
async fn a_directory_travels_to_the_coordinator_and_back() {
    let fixture = Fixture::new(Fault::None).await;
    let packed = fixture.pack(&[
        ("big", sample(3 * CHUNK_BYTES + 1)),
        ("exact", sample(CHUNK_BYTES)),
        ("sub/small", b"x".to_vec()),
        ("sub/same", b"x".to_vec()),
        ("sub/empty", Vec::new()),
    ]);
    let (result, seen) = fixture.upload(&packed).await;
    assert_eq!(result.unwrap(), packed.tree.id());
    let last = seen.last().unwrap();
    assert_eq!(
        (last.blobs, last.bytes),
        (last.total_blobs, last.total_bytes)
    );
    assert_eq!(last.total_blobs, 5, "four contents and the manifest");
    assert!(seen.is_sorted_by_key(|progress| progress.bytes));
    assert_eq!(
        fixture.blobs.peers.lock().unwrap()[0].identity,
        Some(node(7))
    );

    let (result, seen) = fixture.upload(&packed).await;
    result.unwrap();
    assert!(seen.is_empty());
    assert_eq!(
        fixture.blobs.uploads.load(Ordering::Relaxed),
        1,
        "nothing is sent twice"
    );

    let tree = fetch_tree(&fixture.channel, packed.tree.id())
        .await
        .unwrap();
    assert_eq!(tree, packed.tree);
    let cache = fixture.temp.path().join("cache");
    for downloads in [5, 5] {
        soon(
            "the blobs",
            fetch_blobs(&fixture.channel, &tree, &cache, |_| {}),
        )
        .await
        .unwrap();
        // The manifest and four contents, each once.
        assert_eq!(fixture.blobs.offsets.lock().unwrap().len(), downloads);
    }
    let dest = fixture.temp.path().join("dest");
    unpack(&tree, &dest, |digest| {
        fs::File::open(blob_path(&cache, digest))
    })
    .unwrap();
    assert_eq!(pack(&dest, &PackOptions::snapshot()).unwrap().tree, tree);
}

#[tokio::test]
async fn many_blobs_are_asked_for_in_batches() {
    let fixture = Fixture::new(Fault::None).await;
    let digests: Vec<_> = (0..2500_u32).map(|n| digest_of(&n.to_le_bytes())).collect();
    fixture.store(1_u32.to_le_bytes().to_vec());
    let missing = missing(&fixture.channel, &digests).await.unwrap();
    assert_eq!(missing.len(), 2499);
    assert!(!missing.contains(&digests[1]));
    assert_eq!(fixture.blobs.peers.lock().unwrap().len(), 3);
}

#[tokio::test]
async fn a_file_that_changed_since_it_was_packed_is_named() {
    for content in [&b"yyyyy"[..], b"xxxxxx", b""] {
        let fixture = Fixture::new(Fault::None).await;
        let packed = fixture.pack(&[("a", b"xxxxx".to_vec()), ("b", b"other".to_vec())]);
        let path = packed.files[0].path.clone();
        fs::write(&path, content).unwrap();
        let (result, _) = fixture.upload(&packed).await;
        assert!(
            matches!(&result, Err(BlobError::Changed { path: p }) if *p == path),
            "{result:?}"
        );
        fs::remove_file(&path).unwrap();
        let (result, _) = fixture.upload(&packed).await;
        assert!(
            matches!(&result, Err(BlobError::Read { path: p, .. }) if *p == path),
            "{result:?}"
        );
        let stored = fixture.blobs.stored.lock().unwrap();
        assert!(
            !stored.contains_key(&packed.tree.id()),
            "the manifest comes last"
        );
    }
}

#[tokio::test]
async fn refusals_are_told_and_not_repeated() {
    let fixture = Fixture::new(Fault::Deny).await;
    let packed = fixture.pack(&[("a", Vec::new())]);
    let (result, _) = fixture.upload(&packed).await;
    let status = result.unwrap_err().status().unwrap().clone();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert_eq!(fixture.blobs.peers.lock().unwrap().len(), 1);

    let unknown = fetch_tree(&fixture.channel, Digest([1; 32]))
        .await
        .unwrap_err();
    assert_eq!(unknown.status().unwrap().code(), Code::NotFound);
    let not_a_tree = fixture.store(b"hello".to_vec());
    let error = fetch_tree(&fixture.channel, not_a_tree).await.unwrap_err();
    assert!(matches!(error, BlobError::NotATree { .. }), "{error:?}");
}

#[tokio::test]
async fn an_answer_about_something_else_is_refused() {
    let fixture = Fixture::new(Fault::Invent).await;
    let result = missing(&fixture.channel, &[Digest([1; 32])]).await;
    assert!(
        matches!(result, Err(BlobError::Answer { .. })),
        "{result:?}"
    );
}

#[tokio::test]
async fn a_broken_download_continues_where_it_broke() {
    let fixture = Fixture::new(Fault::CutOnce).await;
    let (result, names) = fixture.download(1 << 20).await;
    assert_eq!(result.unwrap(), 600_000);
    assert_eq!(names, ["blob"]);
    let offsets = fixture.blobs.offsets.lock().unwrap().clone();
    assert_eq!(offsets.len(), 2);
    let content = fs::read(fixture.temp.path().join("dest/blob")).unwrap();
    assert!(content == sample(600_000));
}

#[tokio::test]
async fn damage_in_a_download_is_noticed_and_leaves_nothing() {
    for (fault, expected) in [
        (Fault::Flip, "hash"),
        (Fault::Overlong, "size"),
        (Fault::Short, "size"),
    ] {
        let fixture = Fixture::new(fault).await;
        let (result, names) = fixture.download(1 << 20).await;
        match result {
            Err(BlobError::Damaged { what, .. }) => assert_eq!(what, expected, "{fault:?}"),
            other => panic!("{fault:?}: {other:?}"),
        }
        assert!(names.is_empty(), "{names:?}");
    }
    let fixture = Fixture::new(Fault::None).await;
    let (result, names) = fixture.download(599_999).await;
    assert!(
        matches!(result, Err(BlobError::TooLarge { limit: 599_999, .. })),
        "{result:?}"
    );
    assert!(names.is_empty(), "{names:?}");
}

#[tokio::test]
async fn tries_without_progress_are_bounded() {
    let fixture = Fixture::new(Fault::CutAlways).await;
    let (result, names) = fixture.download(1 << 20).await;
    assert!(matches!(result, Err(BlobError::Rpc { .. })), "{result:?}");
    assert!(names.is_empty(), "{names:?}");
    assert_eq!(
        fixture.blobs.offsets.lock().unwrap().len(),
        MAX_TRIES as usize
    );
}

#[tokio::test]
async fn a_channel_says_why_it_cannot_reconnect() {
    let mut fixture = Fixture::new(Fault::None).await;
    missing(&fixture.channel, &[Digest([1; 32])]).await.unwrap();
    fixture.server = AbortOnDrop(spawn("nothing", std::future::ready(())));
    // tonic's tasks of open connections outlive its server.
    assert_eq!(fixture.blobs.connections.close_where(|_| true), 1);
    let refused = async {
        loop {
            let result = client(&fixture.channel)
                .missing(v1::MissingRequest::default())
                .await;
            let Err(status) = result else { continue };
            if let Some(ConnectError::Failed { failures }) = connect_error(&status) {
                return failures.clone();
            }
        }
    };
    let failures = soon("the refused connection", refused).await;
    assert!(
        matches!(failures[0].1, crate::client::EndpointFailure::Refused),
        "{failures:?}"
    );
}
