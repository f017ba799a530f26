//! What a node or a user keeps on disk after enrolment: certificate, key, the authority's certificate, and where the
//! cluster is. The agent's state directory has one such directory, and each context of the command line is one.
//!
//! Files: `cluster.json`, `ca.pem`, `cert.pem`, `key.pem` (0600); the directory is 0700. `cluster.json` is written last
//! and so says that an enrolment is complete. A crash between a renewal's new certificate and its key is repaired when
//! it is loaded.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use trainyard_common::ids::ClusterId;
use trainyard_common::time::Timestamp;

use crate::client::Trust;
use crate::endpoint::Endpoint;
use crate::files;
use crate::identity::{Identity, InvalidIdentity};
use crate::pki::{self, CertificateInfo, KeyPairPem, PkiError};
use crate::sealed::{self, FileRecord};
use crate::tls::{self, ClientCert};
use crate::token::{JoinToken, MAX_ENDPOINTS, TokenKind};

const CLUSTER: &str = "cluster.json";
const CA: &str = "ca.pem";
const CERT: &str = "cert.pem";
const KEY: &str = "key.pem";
/// The key of a certificate that is being replaced.
const NEXT_KEY: &str = "key.next.pem";
/// Bytes of each file that are read; whatever is larger is not ours.
const MAX_FILE_BYTES: u64 = 64 << 10;
/// What `cluster.json` said its version was before it had a first line, and still says for the programs of then.
const VERSION: u32 = 1;

/// A certificate and what is needed to use it.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The cluster.
    pub cluster: ClusterId,
    /// Where its coordinator is, tried in this order.
    pub endpoints: Vec<Endpoint>,
    /// Who this is.
    pub identity: Identity,
    /// The authority's certificate in PEM.
    pub ca_pem: String,
    /// The own certificate in PEM.
    pub cert_pem: String,
    /// Its key.
    pub key: KeyPairPem,
}

/// Why credentials could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// There are none: this machine or user has not enrolled.
    #[error("there are no credentials in {dir:?}: enrol with `yard join` or `yard login`")]
    Missing {
        /// The directory.
        dir: PathBuf,
    },
    /// A file cannot be read or written.
    #[error("cannot {operation} {path:?}")]
    File {
        /// `read` or `write`.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file has something else in it.
    #[error("{path:?} is damaged: {reason}; enrol again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The certificate or key cannot be used.
    #[error("the credentials in {dir:?} cannot be used; enrol again")]
    Unusable {
        /// The directory.
        dir: PathBuf,
        /// Why not.
        #[source]
        source: PkiError,
    },
}

#[derive(Serialize, Deserialize)]
struct ClusterFile {
    version: u32,
    cluster: ClusterId,
    endpoints: Vec<Endpoint>,
    identity: String,
}

impl FileRecord for ClusterFile {
    const KIND: &'static str = "cluster";
    const VERSION: u32 = 2;
}

impl Credentials {
    /// What came out of an enrolment, checked: the certificate is for the key and names somebody in `cluster`.
    ///
    /// # Errors
    /// [`PkiError`].
    pub fn new(
        cluster: ClusterId,
        endpoints: Vec<Endpoint>,
        ca_pem: String,
        cert_pem: String,
        key: KeyPairPem,
    ) -> Result<Self, PkiError> {
        tls::roots(&ca_pem)?;
        let info = matching(&cert_pem, &key)?;
        if info.spiffe.cluster != cluster {
            return Err(PkiError::BadIdentity(InvalidIdentity::Cluster));
        }
        Ok(Self {
            cluster,
            endpoints,
            identity: info.spiffe.identity,
            ca_pem,
            cert_pem,
            key,
        })
    }

    /// Like [`new`](Self::new) for the answer to an enrolment with `token`: the authority must be the one in the token,
    /// and the certificate for the kind of holder that the token enrols.
    ///
    /// # Errors
    /// [`PkiError`].
    pub fn enrolled(
        token: &JoinToken,
        ca_pem: String,
        cert_pem: String,
        key: KeyPairPem,
    ) -> Result<Self, PkiError> {
        if pki::ca_hash(&ca_pem)? != token.ca_hash {
            let reason = "the authority's certificate does not have the hash in the join token";
            return Err(PkiError::BadCertificate { reason });
        }
        let held = Self::new(
            token.cluster,
            token.endpoints.clone(),
            ca_pem,
            cert_pem,
            key,
        )?;
        match (&held.identity, token.kind) {
            (Identity::Node(_), TokenKind::Node) | (Identity::User(_), TokenKind::User) => Ok(held),
            _ => Err(PkiError::BadIdentity(InvalidIdentity::Path)),
        }
    }

    /// Writes everything to `dir`, replacing credentials that are there.
    ///
    /// # Errors
    /// [`CredentialsError::File`]. If the directory had none before, it has none then.
    pub fn save(&self, dir: &Path) -> Result<(), CredentialsError> {
        files::create_private_dir(dir).map_err(write_error(dir))?;
        write(dir, CA, self.ca_pem.as_bytes())?;
        self.save_certificate(dir)?;
        let cluster = ClusterFile {
            version: VERSION,
            cluster: self.cluster,
            endpoints: self.endpoints.clone(),
            identity: self.identity.to_string(),
        };
        let json = sealed::seal(&cluster).map_err(write_error(&dir.join(CLUSTER)))?;
        write(dir, CLUSTER, &json)
    }

    /// Takes a renewed certificate for `key` and writes both to `dir`.
    ///
    /// # Errors
    /// [`CredentialsError`]; also if the certificate is for somebody else.
    pub fn renew(
        &mut self,
        dir: &Path,
        cert_pem: String,
        key: KeyPairPem,
    ) -> Result<(), CredentialsError> {
        let unusable = |source| CredentialsError::Unusable {
            dir: dir.to_owned(),
            source,
        };
        let info = matching(&cert_pem, &key).map_err(unusable)?;
        if info.spiffe != self.identity.in_cluster(self.cluster) {
            return Err(unusable(PkiError::BadIdentity(InvalidIdentity::Path)));
        }
        let renewed = Self {
            cert_pem,
            key,
            ..self.clone()
        };
        renewed.save_certificate(dir)?;
        *self = renewed;
        Ok(())
    }

    /// Reads what [`save`](Self::save) wrote. Dates are not checked, so that one can say *when* it expired.
    ///
    /// # Errors
    /// [`CredentialsError`].
    pub fn load(dir: &Path) -> Result<Self, CredentialsError> {
        let path = dir.join(CLUSTER);
        let json = match read_bytes(dir, CLUSTER) {
            Err(CredentialsError::File { source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                return Err(CredentialsError::Missing {
                    dir: dir.to_owned(),
                });
            }
            other => other?,
        };
        let damaged = |reason: &dyn std::fmt::Display| CredentialsError::Damaged {
            path: path.clone(),
            reason: reason.to_string(),
        };
        let file: ClusterFile = sealed::open(&json).map_err(|error| damaged(&error))?;
        if file.version != VERSION {
            return Err(damaged(&"it was written by another version of Trainyard"));
        }
        if file.endpoints.is_empty() || file.endpoints.len() > MAX_ENDPOINTS {
            return Err(damaged(&"it must list 1 to 8 endpoints"));
        }
        let cert_pem = read(dir, CERT)?;
        let key = load_key(dir, &cert_pem)?;
        let unusable = |source| CredentialsError::Unusable {
            dir: dir.to_owned(),
            source,
        };
        let credentials = Self::new(file.cluster, file.endpoints, read(dir, CA)?, cert_pem, key)
            .map_err(unusable)?;
        if credentials.identity.to_string() != file.identity {
            return Err(damaged(&"it names another identity than the certificate"));
        }
        Ok(credentials)
    }

    /// For [`crate::client::connect`]: how to recognise the coordinator.
    #[must_use]
    pub fn trust(&self) -> Trust {
        Trust::Ca {
            ca_pem: self.ca_pem.clone(),
            cluster: self.cluster,
        }
    }

    /// For [`crate::client::connect`]: who this is.
    ///
    /// # Errors
    /// [`PkiError`], if the fields were changed since they were checked.
    pub fn client_cert(&self) -> Result<ClientCert, PkiError> {
        ClientCert::new(&self.cert_pem, self.key.as_pem())
    }

    /// What the certificate says.
    ///
    /// # Errors
    /// [`PkiError`], if the fields were changed since they were checked.
    pub fn certificate(&self) -> Result<CertificateInfo, PkiError> {
        pki::inspect_pem(&self.cert_pem)
    }

    /// Whether the certificate has ended.
    #[must_use]
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.certificate()
            .map_or(true, |info| now >= info.not_after)
    }

    /// When to renew: at half of the certificate's life, so that a coordinator may be away for the other half.
    #[must_use]
    pub fn renew_at(&self) -> Timestamp {
        self.certificate().map_or(Timestamp(0), |info| {
            let life: Duration = info.not_after.since(info.not_before);
            info.not_before.after(life / 2)
        })
    }

    /// The order makes each crash harmless: an unused next key, or a certificate whose key is the next one.
    fn save_certificate(&self, dir: &Path) -> Result<(), CredentialsError> {
        let next = dir.join(NEXT_KEY);
        files::write_private(&next, self.key.as_pem().as_bytes()).map_err(write_error(&next))?;
        write(dir, CERT, self.cert_pem.as_bytes())?;
        adopt_next_key(dir)
    }
}

fn adopt_next_key(dir: &Path) -> Result<(), CredentialsError> {
    let key = dir.join(KEY);
    fs::rename(dir.join(NEXT_KEY), &key)
        .and_then(|()| files::sync_dir(dir))
        .map_err(write_error(&key))
}

fn load_key(dir: &Path, cert_pem: &str) -> Result<KeyPairPem, CredentialsError> {
    let current = read(dir, KEY).map(KeyPairPem::from_pem);
    if let Ok(key) = &current
        && matching(cert_pem, key).is_ok()
    {
        return current;
    }
    if let Ok(next) = read(dir, NEXT_KEY).map(KeyPairPem::from_pem)
        && matching(cert_pem, &next).is_ok()
    {
        tracing::info!(?dir, "finished an interrupted renewal of a certificate");
        adopt_next_key(dir)?;
        return Ok(next);
    }
    // Whatever is wrong with the current one is told by who uses it.
    current
}

fn matching(cert_pem: &str, key: &KeyPairPem) -> Result<CertificateInfo, PkiError> {
    tls::certified_key(cert_pem, key.as_pem())?;
    pki::inspect_pem(cert_pem)
}

fn read(dir: &Path, name: &str) -> Result<String, CredentialsError> {
    let bytes = read_bytes(dir, name)?;
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        CredentialsError::Damaged {
            path: dir.join(name),
            reason: format!("it is no text at byte {offset}"),
        }
    })
}

fn read_bytes(dir: &Path, name: &str) -> Result<Vec<u8>, CredentialsError> {
    let path = dir.join(name);
    let failed = |source| CredentialsError::File {
        operation: "read",
        path: path.clone(),
        source,
    };
    let size = fs::metadata(&path).map_err(failed)?.len();
    if size > MAX_FILE_BYTES {
        return Err(CredentialsError::Damaged {
            path,
            reason: "it is larger than 64 KiB".to_owned(),
        });
    }
    fs::read(&path).map_err(failed)
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), CredentialsError> {
    let path = dir.join(name);
    files::write_private(&path, bytes).map_err(write_error(&path))
}

fn write_error(path: &Path) -> impl FnOnce(io::Error) -> CredentialsError {
    let path = path.to_owned();
    move |source| CredentialsError::File {
        operation: "write",
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use trainyard_common::ids::TokenId;

    use super::*;
    use crate::pki::LEAF_VALIDITY;
    use crate::testing::{Cluster, long_ago, node, now};
    use crate::token::Secret;

    fn issue(cluster: &Cluster, at: Timestamp) -> (String, KeyPairPem) {
        let (cert, key) = cluster.issue(&node(7), at);
        (cert, KeyPairPem::from_pem(key))
    }

    fn credentials(cluster: &Cluster, at: Timestamp) -> Credentials {
        let endpoints = vec!["head:1".parse().unwrap(), "[::1]:7443".parse().unwrap()];
        let (cert, key) = issue(cluster, at);
        let ca = cluster.authority.cert_pem().to_owned();
        Credentials::new(cluster.authority.cluster(), endpoints, ca, cert, key).unwrap()
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
    fn credentials_survive_their_directory() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("state/credentials");
        assert!(matches!(
            Credentials::load(&dir),
            Err(CredentialsError::Missing { .. })
        ));
        let cluster = Cluster::new();
        let saved = credentials(&cluster, now());
        saved.save(&dir).unwrap();
        let loaded = Credentials::load(&dir).unwrap();
        assert_eq!(loaded.identity, node(7));
        assert_eq!(loaded.endpoints, saved.endpoints);
        assert_eq!(loaded.trust(), cluster.trust());
        assert_eq!(loaded.cert_pem, saved.cert_pem);
        loaded.client_cert().unwrap();
        assert_eq!(names(&dir), [CA, CERT, CLUSTER, KEY]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            assert_eq!(mode(&path), 0o600, "{}", path.display());
        }
        assert!(!format!("{loaded:?}").contains("PRIVATE"));
    }

    /// Both forms in which it was ever written, byte for byte.
    #[test]
    fn golden_cluster_files_are_read_and_every_damage_is_seen() {
        let file = ClusterFile {
            version: VERSION,
            cluster: ClusterId([0xab; 16]),
            endpoints: vec!["head:7443".parse().unwrap(), "[::1]:7443".parse().unwrap()],
            identity: node(7).to_string(),
        };
        let old = include_bytes!("../golden/cluster-1.json");
        let new = include_bytes!("../golden/cluster-2.json");
        assert_eq!(serde_json::to_vec_pretty(&file).unwrap(), old);
        assert_eq!(
            String::from_utf8(sealed::seal(&file).unwrap()).unwrap(),
            String::from_utf8_lossy(new)
        );
        let text = |bytes: &[u8]| {
            sealed::open::<ClusterFile>(bytes).map(|file| serde_json::to_string(&file).unwrap())
        };
        let golden = serde_json::to_string(&file).unwrap();
        assert_eq!(text(old).unwrap(), golden);
        assert_eq!(text(new).unwrap(), golden);
        for cut in 0..new.len() {
            text(&new[..cut]).unwrap_err();
            text(&old[..cut.min(old.len() - 1)]).unwrap_err();
        }
        for bit in 0..new.len() * 8 {
            let mut flipped = new.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(read) = text(&flipped) {
                assert_eq!(read, golden, "bit {bit}");
            }
        }
    }

    #[test]
    fn an_enrolment_must_fit_its_token() {
        let cluster = Cluster::new();
        let ca = cluster.authority.cert_pem().to_owned();
        let token = JoinToken {
            endpoints: vec!["head:1".parse().unwrap()],
            ca_hash: cluster.authority.hash(),
            cluster: cluster.authority.cluster(),
            kind: TokenKind::Node,
            id: TokenId(1),
            secret: Secret::generate().unwrap(),
            reusable: false,
        };
        let (cert, key) = issue(&cluster, now());
        let enrolled = |token: &JoinToken, ca: &str| {
            Credentials::enrolled(token, ca.to_owned(), cert.clone(), key.clone())
        };
        let held = enrolled(&token, &ca).unwrap();
        assert_eq!(
            (held.identity, held.endpoints),
            (node(7), token.endpoints.clone())
        );
        let user = JoinToken {
            kind: TokenKind::User,
            ..token.clone()
        };
        assert!(matches!(
            enrolled(&user, &ca),
            Err(PkiError::BadIdentity(_))
        ));
        let elsewhere = JoinToken {
            cluster: ClusterId([9; 16]),
            ..token.clone()
        };
        assert!(matches!(
            enrolled(&elsewhere, &ca),
            Err(PkiError::BadIdentity(_))
        ));
        let other = Cluster::new();
        let result = enrolled(&token, other.authority.cert_pem());
        assert!(matches!(result, Err(PkiError::BadCertificate { .. })));
    }

    #[test]
    fn renewal_replaces_certificate_and_key() {
        let temp = tempfile::tempdir().unwrap();
        let cluster = Cluster::new();
        let mut held = credentials(&cluster, now());
        held.save(temp.path()).unwrap();
        let (cert, key) = issue(&cluster, now());
        held.renew(temp.path(), cert.clone(), key).unwrap();
        assert_eq!(Credentials::load(temp.path()).unwrap().cert_pem, cert);

        let (other, key) = cluster.issue(&node(8), now());
        let result = held.renew(temp.path(), other, KeyPairPem::from_pem(key));
        assert!(
            matches!(result, Err(CredentialsError::Unusable { .. })),
            "somebody else's"
        );
        let (cert, _) = issue(&cluster, now());
        let (_, key) = issue(&cluster, now());
        let result = held.renew(temp.path(), cert, key);
        assert!(matches!(
            result,
            Err(CredentialsError::Unusable {
                source: PkiError::KeyMismatch,
                ..
            })
        ));
        Credentials::load(temp.path()).unwrap();
    }

    #[test]
    fn a_crash_at_each_step_of_a_renewal_is_repaired() {
        let cluster = Cluster::new();
        let old = credentials(&cluster, now());
        let (cert, key) = issue(&cluster, now());
        let new = Credentials {
            cert_pem: cert,
            key,
            ..old.clone()
        };
        for steps in 0..3 {
            let temp = tempfile::tempdir().unwrap();
            let dir = temp.path();
            old.save(dir).unwrap();
            if steps >= 1 {
                files::write_private(&dir.join(NEXT_KEY), new.key.as_pem().as_bytes()).unwrap();
            }
            if steps >= 2 {
                write(dir, CERT, new.cert_pem.as_bytes()).unwrap();
            }
            let expected = if steps < 2 { &old } else { &new };
            for _ in 0..2 {
                let loaded = Credentials::load(dir).unwrap();
                assert_eq!(loaded.cert_pem, expected.cert_pem, "after {steps} steps");
                assert_eq!(loaded.key.as_pem(), expected.key.as_pem());
            }
        }
    }

    #[test]
    fn damage_is_noticed_and_named() {
        let cluster = Cluster::new();
        for (name, content) in [
            (CLUSTER, "{}"),
            (
                CLUSTER,
                "{\"version\":2,\"cluster\":\"01010101010101010101010101010101\",\"endpoints\":[\"a:1\"],\"identity\":\"node/7\"}",
            ),
            (
                CLUSTER,
                "{\"version\":1,\"cluster\":\"01010101010101010101010101010101\",\"endpoints\":[],\"identity\":\"node/7\"}",
            ),
            (
                CLUSTER,
                "{\"version\":1,\"cluster\":\"01010101010101010101010101010101\",\"endpoints\":[\"a:1\"],\"identity\":\"node/8\"}",
            ),
            (
                CLUSTER,
                "{\"version\":1,\"cluster\":\"02020202020202020202020202020202\",\"endpoints\":[\"a:1\"],\"identity\":\"node/7\"}",
            ),
            (CA, "nonsense"),
            (CERT, ""),
            (KEY, "nonsense"),
        ] {
            let temp = tempfile::tempdir().unwrap();
            credentials(&cluster, now()).save(temp.path()).unwrap();
            fs::write(temp.path().join(name), content).unwrap();
            let error = Credentials::load(temp.path()).unwrap_err();
            assert!(
                error.to_string().contains("enrol again"),
                "{name} {content}: {error}"
            );
        }
        let temp = tempfile::tempdir().unwrap();
        credentials(&cluster, now()).save(temp.path()).unwrap();
        fs::remove_file(temp.path().join(KEY)).unwrap();
        assert!(matches!(
            Credentials::load(temp.path()),
            Err(CredentialsError::File { .. })
        ));
        fs::write(temp.path().join(CA), vec![b'x'; 70_000]).unwrap();
        assert!(Credentials::load(temp.path()).is_err());
    }

    #[test]
    fn expiry_and_renewal_follow_the_certificate() {
        let cluster = Cluster::new();
        let at = Timestamp(now().0 / 1000 * 1000);
        let held = credentials(&cluster, at);
        let end = at.after(LEAF_VALIDITY);
        assert!(!held.is_expired(Timestamp(end.0 - 1)));
        assert!(held.is_expired(end));
        assert!(credentials(&cluster, long_ago()).is_expired(now()));
        let half = at.0 + (end.0 - at.0) / 2;
        assert!(held.renew_at().0.abs_diff(half) < 300_000);
    }
}
