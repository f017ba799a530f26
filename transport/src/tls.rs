//! What both ends of a connection share: the one crypto provider, TLS 1.3 only, HTTP/2 only, and certificates that
//! can be replaced while connections live.
//!
//! Nothing here is process-global: rustls' default provider is never installed, as two libraries would fight for it.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::ResolvesClientCert;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{InconsistentKeys, RootCertStore, SignatureScheme, SupportedProtocolVersion};
use trainyard_common::time::Timestamp;

use crate::identity::SpiffeId;
use crate::pki::{self, CertificateInfo, PkiError};

/// The only protocol inside TLS.
pub(crate) const ALPN: &[u8] = b"h2";
/// Both ends are ours, so there is no older TLS to speak.
pub(crate) const VERSIONS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// The crypto provider, passed explicitly everywhere.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// A store that trusts the one authority in `ca_pem`.
pub(crate) fn roots(ca_pem: &str) -> Result<RootCertStore, PkiError> {
    let mut roots = RootCertStore::empty();
    let ca = pki::certificates(ca_pem)?.swap_remove(0);
    roots.add(ca).map_err(|_| PkiError::BadCertificate {
        reason: "it is not an authority's",
    })?;
    Ok(roots)
}

/// The certificate of a node, user or coordinator as a client, with its key.
///
/// Clones share it: after [`replace`](Self::replace) new handshakes use the new one, open connections live on.
#[derive(Clone)]
pub struct ClientCert {
    current: Arc<Current>,
}

impl fmt::Debug for ClientCert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ClientCert").field(&self.info()).finish()
    }
}

impl ClientCert {
    /// From a certificate and its key, both PEM.
    ///
    /// # Errors
    /// If one cannot be read, names no identity, or they do not belong together. Dates are not checked.
    pub fn new(cert_pem: &str, key_pem: &str) -> Result<Self, PkiError> {
        Ok(Self {
            current: Arc::new(Current::new(cert_pem, key_pem)?),
        })
    }

    /// Uses another certificate from now on, such as a renewed one.
    ///
    /// # Errors
    /// Like [`new`](Self::new); the old one stays then.
    pub fn replace(&self, cert_pem: &str, key_pem: &str) -> Result<(), PkiError> {
        self.current.replace(cert_pem, key_pem)
    }

    /// Whom it names.
    #[must_use]
    pub fn spiffe(&self) -> SpiffeId {
        self.info().spiffe
    }

    /// When it ends.
    #[must_use]
    pub fn not_after(&self) -> Timestamp {
        self.info().not_after
    }

    /// Everything it says.
    #[must_use]
    pub fn info(&self) -> CertificateInfo {
        self.current.read().info.clone()
    }

    pub(crate) fn resolver(&self) -> Arc<dyn ResolvesClientCert> {
        self.current.clone()
    }
}

/// A certificate with its key that handshakes pick up at the moment they need it.
pub(crate) struct Current(RwLock<Loaded>);

#[derive(Clone)]
struct Loaded {
    key: Arc<CertifiedKey>,
    info: CertificateInfo,
}

impl Current {
    pub(crate) fn new(chain_pem: &str, key_pem: &str) -> Result<Self, PkiError> {
        Ok(Self(RwLock::new(load(chain_pem, key_pem)?)))
    }

    pub(crate) fn replace(&self, chain_pem: &str, key_pem: &str) -> Result<(), PkiError> {
        let loaded = load(chain_pem, key_pem)?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        Ok(())
    }

    fn read(&self) -> Loaded {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl fmt::Debug for Current {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Current").field(&self.read().info).finish()
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.read().key)
    }
}

impl ResolvesClientCert for Current {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.read().key)
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Checks that a key belongs to a certificate and that rustls can use both.
pub(crate) fn certified_key(chain_pem: &str, key_pem: &str) -> Result<CertifiedKey, PkiError> {
    let chain = pki::certificates(chain_pem)?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
        .map_err(|_| PkiError::BadKey(rcgen::Error::CouldNotParseKeyPair))?;
    CertifiedKey::from_der(chain, key, &provider()).map_err(|error| match error {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => PkiError::KeyMismatch,
        rustls::Error::InvalidCertificate(_) => PkiError::BadCertificate {
            reason: "it is not X.509",
        },
        _ => PkiError::BadKey(rcgen::Error::CouldNotParseKeyPair),
    })
}

fn load(chain_pem: &str, key_pem: &str) -> Result<Loaded, PkiError> {
    Ok(Loaded {
        key: Arc::new(certified_key(chain_pem, key_pem)?),
        info: pki::inspect_pem(chain_pem)?,
    })
}
