//! Enrolment: a join token is traded for a certificate. The same for machines and for users.
//!
//! The private key is made here and never leaves. The coordinator is recognised by the CA hash in the token before the
//! token's secret is sent.

use trainyard_common::error::Refusal;
use trainyard_common::limits::MAX_ENROLL_MESSAGE;
use trainyard_proto::status::from_status;
use trainyard_proto::v1::EnrollRequest;
use trainyard_proto::v1::enroll_service_client::EnrollServiceClient;

use crate::client::{self, ConnectError, Trust};
use crate::credentials::Credentials;
use crate::pki::{KeyPairPem, PkiError};
use crate::token::JoinToken;

/// Why nobody was enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The coordinator cannot be reached, or whatever answers is not it.
    #[error("cannot reach the coordinator to enrol")]
    Connect(#[source] ConnectError),
    /// The coordinator refused the token.
    #[error("the coordinator refused to enrol")]
    Refused(#[source] Refusal),
    /// The key or the answer's certificate is not usable.
    #[error("cannot use what the enrolment gave")]
    Certificate(#[source] PkiError),
}

/// Uses a token once. `name` is the machine's name and is ignored for users.
///
/// # Errors
/// [`EnrolError`]. After an error that is not [`EnrolError::Connect`] the token may be used up.
pub async fn enrol(token: &JoinToken, name: &str) -> Result<Credentials, EnrolError> {
    let key = KeyPairPem::generate().map_err(EnrolError::Certificate)?;
    let certificate_request = key.csr().map_err(EnrolError::Certificate)?;
    let trust = Trust::CaHash {
        hash: token.ca_hash,
        cluster: token.cluster,
    };
    let channel = client::connect(&token.endpoints, &trust, None)
        .await
        .map_err(EnrolError::Connect)?;
    let request = EnrollRequest {
        token: token.id.0,
        secret: token.secret.as_bytes().to_vec(),
        certificate_request,
        name: name.to_owned(),
    };
    let answer = EnrollServiceClient::new(channel)
        .max_decoding_message_size(MAX_ENROLL_MESSAGE)
        .enroll(request)
        .await
        .map_err(|status| EnrolError::Refused(from_status(&status)))?
        .into_inner();
    Credentials::enrolled(token, answer.ca, answer.certificate, key)
        .map_err(EnrolError::Certificate)
}
