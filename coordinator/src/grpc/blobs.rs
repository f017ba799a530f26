//! `BlobService`: which blobs are missing, taking blobs, giving blobs. Knowing a blob's hash is the right to read it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use tonic::{Request, Response, Status, Streaming};
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_proto::convert::{self, InvalidField};
use trainyard_proto::status::{from_status, to_status};
use trainyard_proto::v1;

use super::{Answers, Sender, Shared, answers, reply, shutting_down};
use crate::auth::ActivityGuard;
use crate::blobs::{BlobReader, Receiving};
use trainyard_transport::task::{blocking, spawn};

/// Digests of one question, as the proto says.
const MAX_DIGESTS: usize = 1000;

/// `BlobService`.
pub(crate) struct BlobApi(pub(crate) Arc<Shared>);

impl BlobApi {
    async fn missing(&self, request: v1::MissingRequest) -> Result<v1::MissingResponse, Refusal> {
        if request.digests.len() > MAX_DIGESTS {
            let problem = format!(
                "{} are given; at most {MAX_DIGESTS} may be",
                request.digests.len()
            );
            return Err(InvalidField::new("digests", problem).into());
        }
        let digests = convert::digests("digests", &request.digests)?;
        let blobs = self.0.blobs.clone();
        let missing = blocking(move || {
            let missing = digests
                .into_iter()
                .filter(|digest| !blobs.contains(*digest));
            missing.map(|digest| digest.0.to_vec()).collect()
        });
        Ok(v1::MissingResponse {
            digests: missing.await,
        })
    }

    async fn upload(
        &self,
        mut parts: Streaming<v1::UploadRequest>,
    ) -> Result<v1::UploadResponse, Refusal> {
        let mut upload = Upload {
            shared: self.0.clone(),
            current: None,
            touched: BTreeSet::new(),
            stored: 0,
        };
        loop {
            let part = tokio::select! {
                biased;
                // Cancel-safe: a token stays cancelled.
                () = self.0.stop.cancelled() => return Err(shutting_down()),
                // Not to be used again after the other branch won, and it is not.
                part = parts.message() => part.map_err(|status| from_status(&status))?,
            };
            let Some(part) = part else {
                return upload.end().await;
            };
            upload.take(part).await?;
        }
    }

    async fn download(
        &self,
        request: v1::DownloadRequest,
        activity: Option<ActivityGuard>,
    ) -> Result<Answers<v1::DownloadResponse>, Refusal> {
        let digest = convert::digest("digest", &request.digest)?;
        let blobs = self.0.blobs.clone();
        let reader = blocking(move || blobs.reader(digest, request.offset)).await?;
        let (sender, answers) = answers();
        let shared = self.0.clone();
        spawn("download", async move {
            tokio::select! {
                biased;
                // Cancel-safe: a token stays cancelled; a download that is cut off is begun again from its offset.
                () = shared.stop.cancelled() => drop(sender.try_send(Err(to_status(&shutting_down())))),
                () = send_blob(reader, &sender) => {}
            }
            drop(activity);
        });
        Ok(answers)
    }
}

async fn send_blob(mut reader: BlobReader, sender: &Sender<v1::DownloadResponse>) {
    let size = reader.size();
    let mut first = true;
    loop {
        let (back, chunk) = blocking(move || {
            let chunk = reader.next_chunk();
            (reader, chunk)
        })
        .await;
        reader = back;
        let message = match chunk {
            Ok(data) if data.is_empty() && !first => return,
            Ok(data) => Ok(v1::DownloadResponse {
                data,
                size: if first { size } else { 0 },
            }),
            Err(error) => Err(to_status(&error.into())),
        };
        first = false;
        let failed = message.is_err();
        if sender.send(message).await.is_err() || failed {
            return;
        }
    }
}

/// The blobs of one upload.
struct Upload {
    shared: Arc<Shared>,
    current: Option<Receiving>,
    /// Directories whose names are to be synced before the upload is acknowledged.
    touched: BTreeSet<PathBuf>,
    stored: u32,
}

impl Upload {
    async fn take(&mut self, message: v1::UploadRequest) -> Result<(), Refusal> {
        use v1::upload_request::Part;
        match message.part {
            Some(Part::Header(v1::BlobHeader { digest, size })) => {
                self.finish_current().await?;
                let digest = convert::digest("header.digest", &digest)?;
                let blobs = self.shared.blobs.clone();
                self.current = Some(blocking(move || blobs.receive(digest, size)).await?);
                Ok(())
            }
            Some(Part::Data(data)) => {
                let Some(mut receiving) = self.current.take() else {
                    let message = "data came before the header of a blob";
                    return Err(Refusal::new(ErrorCode::Invalid, "NO_HEADER", message).at("data"));
                };
                let received = blocking(move || receiving.write(&data).map(|()| receiving)).await?;
                self.current = Some(received);
                Ok(())
            }
            None => Err(InvalidField::missing("part").into()),
        }
    }

    async fn finish_current(&mut self) -> Result<(), Refusal> {
        let Some(receiving) = self.current.take() else {
            return Ok(());
        };
        let blobs = self.shared.blobs.clone();
        let mut touched = std::mem::take(&mut self.touched);
        let (touched, new) = blocking(move || {
            let new = blobs.finish(receiving, &mut touched);
            (touched, new)
        })
        .await;
        self.touched = touched;
        self.stored = self.stored.saturating_add(u32::from(new?));
        Ok(())
    }

    async fn end(mut self) -> Result<v1::UploadResponse, Refusal> {
        self.finish_current().await?;
        let Self {
            shared,
            touched,
            stored,
            ..
        } = self;
        let blobs = shared.blobs.clone();
        blocking(move || blobs.sync(&touched)).await?;
        Ok(v1::UploadResponse { stored })
    }
}

#[tonic::async_trait]
impl v1::blob_service_server::BlobService for BlobApi {
    type DownloadStream = Answers<v1::DownloadResponse>;

    async fn missing(
        &self,
        request: Request<v1::MissingRequest>,
    ) -> Result<Response<v1::MissingResponse>, Status> {
        reply(BlobApi::missing(self, request.into_inner()).await)
    }

    async fn upload(
        &self,
        request: Request<Streaming<v1::UploadRequest>>,
    ) -> Result<Response<v1::UploadResponse>, Status> {
        reply(BlobApi::upload(self, request.into_inner()).await)
    }

    async fn download(
        &self,
        request: Request<v1::DownloadRequest>,
    ) -> Result<Response<Self::DownloadStream>, Status> {
        let activity = request.extensions().get::<ActivityGuard>().cloned();
        reply(BlobApi::download(self, request.into_inner(), activity).await)
    }
}
