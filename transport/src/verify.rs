//! The client's check of the server's certificate: signed by the cluster's authority, for serving, now, and naming
//! the cluster's coordinator.
//!
//! It knows the authority either by its certificate or, before enrolment, only by its hash.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, DigitallySignedStruct, Error, PeerIncompatible, RootCertStore,
    SignatureScheme,
};

use crate::client::Trust;
use crate::identity::{Identity, SpiffeId};
use crate::pki::{self, PkiError};
use crate::tls;

/// Certificates beside the leaf that a server may send. Ours sends one.
const MAX_INTERMEDIATES: usize = 4;

#[derive(Debug)]
pub(crate) struct CoordinatorVerifier {
    anchor: Anchor,
    expected: SpiffeId,
    algorithms: WebPkiSupportedAlgorithms,
}

#[derive(Debug)]
enum Anchor {
    Known(RootCertStore),
    Hash([u8; 32]),
}

impl CoordinatorVerifier {
    pub(crate) fn new(trust: &Trust) -> Result<Self, PkiError> {
        let (anchor, cluster) = match trust {
            Trust::Ca { ca_pem, cluster } => (Anchor::Known(tls::roots(ca_pem)?), *cluster),
            Trust::CaHash { hash, cluster } => (Anchor::Hash(*hash), *cluster),
        };
        let algorithms = tls::provider().signature_verification_algorithms;
        Ok(Self {
            anchor,
            expected: Identity::Coordinator.in_cluster(cluster),
            algorithms,
        })
    }

    fn verify_chain(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let sent;
        let roots = match &self.anchor {
            Anchor::Known(roots) => roots,
            Anchor::Hash(hash) => {
                sent = sent_authority(hash, others)?;
                &sent
            }
        };
        let leaf = ParsedCertificate::try_from(leaf)?;
        verify_server_cert_signed_by_trust_anchor(&leaf, roots, others, now, self.algorithms.all)
    }
}

/// The certificate among those sent that has the hash. Anybody can send it; what proves something is that it verifies
/// the leaf, whose key the server proves to hold.
fn sent_authority(hash: &[u8; 32], sent: &[CertificateDer<'_>]) -> Result<RootCertStore, Error> {
    let authority = sent
        .iter()
        .find(|certificate| pki::certificate_hash(certificate) == *hash)
        .ok_or(CertificateError::UnknownIssuer)?;
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone().into_owned())?;
    Ok(roots)
}

impl ServerCertVerifier for CoordinatorVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _name: &ServerName<'_>, // see client.rs for why names are not compared
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if others.len() > MAX_INTERMEDIATES {
            return Err(Error::General(
                "the server sent too many certificates".to_owned(),
            ));
        }
        self.verify_chain(leaf, others, now)?;
        match pki::inspect(leaf) {
            Ok(info) if info.spiffe == self.expected => Ok(ServerCertVerified::assertion()),
            _ => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        // Never called: TLS 1.2 is not offered.
        Err(PeerIncompatible::ServerDoesNotSupportTls12Or13.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
