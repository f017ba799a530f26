//! Renews the node's certificate at half of its life, so that a coordinator may be away for the other half.

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::sleep;
use trainyard_proto::v1;
use trainyard_proto::v1::enroll_service_client::EnrollServiceClient;
use trainyard_transport::client::ConnectError;
use trainyard_transport::credentials::{Credentials, CredentialsError};
use trainyard_transport::pki::{KeyPairPem, PkiError};

use crate::chain::chain;
use crate::link::Link;
use trainyard_transport::clock::wall_now;
use trainyard_transport::task::blocking;

/// How often the wall clock is looked at: it may jump, and certificates go by it.
const LOOK: Duration = Duration::from_secs(60);
/// Pause after a renewal that failed; a certificate's second half has room for dozens.
const PAUSE: Duration = Duration::from_secs(300);

#[derive(Debug, thiserror::Error)]
enum RenewError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the coordinator refused")]
    Rpc(#[from] Box<tonic::Status>),
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

/// Renews whenever it is time, until it is dropped. `dir` is where the credentials are kept.
pub(crate) async fn run(mut credentials: Credentials, dir: PathBuf, link: Link) {
    loop {
        if wall_now() < credentials.renew_at() {
            sleep(LOOK).await;
            continue;
        }
        match renew(credentials.clone(), dir.clone(), &link).await {
            Ok(renewed) => {
                credentials = renewed;
                tracing::info!(node = %link.node(), "renewed the node's certificate");
            }
            Err(error) => {
                tracing::warn!(
                    error = chain(&error),
                    "cannot renew the node's certificate, will try again"
                );
                sleep(PAUSE).await;
            }
        }
    }
}

async fn renew(
    mut credentials: Credentials,
    dir: PathBuf,
    link: &Link,
) -> Result<Credentials, RenewError> {
    let key = KeyPairPem::generate()?;
    let request = v1::RenewRequest {
        certificate_request: key.csr()?,
    };
    let answer = EnrollServiceClient::new(link.bulk().await?)
        .renew(request)
        .await
        .map_err(Box::new)?
        .into_inner();
    // On disk first: a certificate that is in use must survive a restart.
    let credentials = blocking(move || {
        credentials.renew(&dir, answer.certificate, key)?;
        Ok::<_, CredentialsError>(credentials)
    })
    .await?;
    link.cert()
        .replace(&credentials.cert_pem, credentials.key.as_pem())?;
    link.renewed().await;
    Ok(credentials)
}
