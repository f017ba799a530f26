//! The cluster's authority as the coordinator keeps it, its own certificate, and the credentials of the local admin.
//!
//! Files: `ca/ca.pem`, `ca/ca.key.pem` (0600) in a directory of mode 0700; `admin/` in the form of
//! `trainyard_transport::credentials`. Everything that signs goes through [`Certificates`].

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{ClusterId, UserName};
use trainyard_common::time::Timestamp;
use trainyard_transport::credentials::{Credentials, CredentialsError};
use trainyard_transport::endpoint::Endpoint;
use trainyard_transport::files;
use trainyard_transport::identity::Identity;
use trainyard_transport::pki::{Authority, IssuedCertificate, KeyPairPem, PkiError, ServerCert};

/// Life of a node's certificate. Agents renew at half of it, so a coordinator may be away for three days and every
/// agent still gets in; a stolen one is of use for a week at most, and less if the node is removed.
pub(crate) const NODE_VALIDITY: Duration = Duration::from_secs(7 * 86_400);
/// Life of a user's certificate. People come back after holidays; a user who is removed is refused at once anyhow.
pub(crate) const USER_VALIDITY: Duration = Duration::from_secs(365 * 86_400);
/// Life of the coordinator's own certificate, which is issued anew at each start.
const SERVER_VALIDITY: Duration = Duration::from_secs(365 * 86_400);
/// The local admin's certificate is issued anew at a start within this time before its end.
const ADMIN_RENEWAL: Duration = Duration::from_secs(30 * 86_400);

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file failed.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Keys or certificates cannot be used.
    #[error("the cluster's authority in {} cannot be used", path.display())]
    Pki {
        /// Its directory.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: PkiError,
    },
    /// The authority is another cluster's than the state.
    #[error("the authority in {} is that of cluster {found}, but the state is that of cluster {expected}", path.display())]
    OtherCluster {
        /// Its directory.
        path: PathBuf,
        /// Whose it is.
        found: ClusterId,
        /// Whose it should be.
        expected: ClusterId,
    },
    /// The authority is gone.
    #[error(
        "the cluster's authority is missing: {} is not there although cluster {cluster} has jobs, nodes or users; \
         restore the directory from a backup",
        path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
        /// The cluster.
        cluster: ClusterId,
    },
    /// The local admin's credentials cannot be written.
    #[error("cannot keep the local admin's credentials")]
    Admin(#[source] CredentialsError),
}

/// Where the authority lies in a state directory; its presence says that a cluster has existed.
pub(crate) fn directory(data_dir: &Path) -> PathBuf {
    data_dir.join("ca")
}

/// The authority and what it signs.
#[derive(Debug)]
pub(crate) struct Certificates {
    authority: Authority,
    dir: PathBuf,
    digest: [u8; 32],
}

impl Certificates {
    /// Reads the authority, or makes it for a cluster that is `new`.
    pub(crate) fn open(
        data_dir: &Path,
        cluster: ClusterId,
        new: bool,
        now: Timestamp,
    ) -> Result<Self, AuthorityError> {
        let dir = directory(data_dir);
        let (cert, key) = (dir.join("ca.pem"), dir.join("ca.key.pem"));
        let pki = |source| AuthorityError::Pki {
            path: dir.clone(),
            source,
        };
        let authority = if cert.exists() {
            Authority::load(&read(&cert)?, &read(&key)?).map_err(pki)?
        } else if new {
            let authority = Authority::create(cluster, now).map_err(pki)?;
            files::create_private_dir(&dir).map_err(failed("make", &dir))?;
            // The key first: a certificate without a key would look like a whole authority.
            files::write_private(&key, authority.key_pem().as_bytes())
                .map_err(failed("write", &key))?;
            files::write_private(&cert, authority.cert_pem().as_bytes())
                .map_err(failed("write", &cert))?;
            authority
        } else {
            return Err(AuthorityError::Missing {
                path: cert,
                cluster,
            });
        };
        if authority.cluster() != cluster {
            let found = authority.cluster();
            return Err(AuthorityError::OtherCluster {
                path: dir,
                found,
                expected: cluster,
            });
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(read(&cert)?.as_bytes());
        hasher.update(&[0]);
        hasher.update(read(&key)?.as_bytes());
        let digest = *hasher.finalize().as_bytes();
        Ok(Self {
            authority,
            dir,
            digest,
        })
    }

    /// Of both files: a certificate is not checked by anybody who trusts it, so a changed one would not be noticed.
    pub(crate) fn digest(&self) -> [u8; 32] {
        self.digest
    }

    pub(crate) fn ca_pem(&self) -> &str {
        self.authority.cert_pem()
    }

    pub(crate) fn ca_hash(&self) -> [u8; 32] {
        self.authority.hash()
    }

    /// The coordinator's own certificate for this start.
    pub(crate) fn server(
        &self,
        names: &[String],
        now: Timestamp,
    ) -> Result<ServerCert, AuthorityError> {
        self.authority
            .issue_server(names, SERVER_VALIDITY, now)
            .map_err(|source| AuthorityError::Pki {
                path: self.dir.clone(),
                source,
            })
    }

    /// Whether a certificate request can be signed; asked before a token is used up.
    pub(crate) fn check_request(&self, request: &str, now: Timestamp) -> Result<(), Refusal> {
        // Signed for nobody and thrown away: the checks are the signer's.
        let nobody = Identity::Node(trainyard_common::ids::NodeId(u32::MAX));
        self.authority
            .sign_csr(request, &nobody, Duration::ZERO, now)
            .map(drop)
            .map_err(refusal)
    }

    /// A certificate for a node or user.
    pub(crate) fn issue(
        &self,
        request: &str,
        identity: &Identity,
        now: Timestamp,
    ) -> Result<IssuedCertificate, Refusal> {
        let validity = match identity {
            Identity::Node(_) => NODE_VALIDITY,
            Identity::User(_) | Identity::Coordinator => USER_VALIDITY,
        };
        self.authority
            .sign_csr(request, identity, validity, now)
            .map_err(refusal)
    }

    /// Makes or renews the credentials of the local admin in `dir`, with these endpoints.
    pub(crate) fn write_admin(
        &self,
        dir: &Path,
        name: &UserName,
        endpoints: &[Endpoint],
        now: Timestamp,
    ) -> Result<(), AuthorityError> {
        let identity = Identity::User(name.clone());
        let kept = Credentials::load(dir).ok().filter(|kept| {
            kept.cluster == self.authority.cluster()
                && kept.identity == identity
                && kept
                    .certificate()
                    .is_ok_and(|info| info.not_after > now.after(ADMIN_RENEWAL))
        });
        let credentials = match kept {
            Some(kept) if kept.endpoints == endpoints => return Ok(()),
            Some(kept) => Credentials {
                endpoints: endpoints.to_vec(),
                ..kept
            },
            None => self
                .make_admin(&identity, endpoints, now)
                .map_err(|source| AuthorityError::Pki {
                    path: self.dir.clone(),
                    source,
                })?,
        };
        credentials.save(dir).map_err(AuthorityError::Admin)
    }

    fn make_admin(
        &self,
        identity: &Identity,
        endpoints: &[Endpoint],
        now: Timestamp,
    ) -> Result<Credentials, PkiError> {
        let key = KeyPairPem::generate()?;
        let issued = self
            .authority
            .sign_csr(&key.csr()?, identity, USER_VALIDITY, now)?;
        let ca = self.ca_pem().to_owned();
        Credentials::new(
            self.authority.cluster(),
            endpoints.to_vec(),
            ca,
            issued.pem,
            key,
        )
    }
}

fn refusal(error: PkiError) -> Refusal {
    match error {
        PkiError::BadRequest { .. } => Refusal::new(
            ErrorCode::Invalid,
            "BAD_CERTIFICATE_REQUEST",
            error.to_string(),
        )
        .at("certificate_request"),
        other => {
            tracing::error!(error = %other, "a certificate could not be signed");
            Refusal::new(
                ErrorCode::Internal,
                "CANNOT_SIGN",
                "the coordinator could not sign the certificate",
            )
        }
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> AuthorityError {
    let path = path.to_owned();
    move |source| AuthorityError::File {
        operation,
        path,
        source,
    }
}

fn read(path: &Path) -> Result<String, AuthorityError> {
    fs::read_to_string(path).map_err(failed("read", path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use trainyard_transport::clock::Clock;

    const CLUSTER: ClusterId = ClusterId([7; 16]);

    #[test]
    fn the_authority_is_made_once_and_kept_private() {
        let dir = tempfile::tempdir().unwrap();
        let now = Clock::start().now();
        let made = Certificates::open(dir.path(), CLUSTER, true, now).unwrap();
        for (path, mode) in [
            ("ca", 0o700),
            ("ca/ca.key.pem", 0o600),
            ("ca/ca.pem", 0o600),
        ] {
            let found = fs::metadata(dir.path().join(path))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(found & 0o777, mode, "{path}");
        }
        let again = Certificates::open(dir.path(), CLUSTER, false, now).unwrap();
        assert_eq!(again.ca_hash(), made.ca_hash());
        let other = Certificates::open(dir.path(), ClusterId([8; 16]), false, now);
        assert!(matches!(other, Err(AuthorityError::OtherCluster { .. })));
        fs::remove_dir_all(dir.path().join("ca")).unwrap();
        let gone = Certificates::open(dir.path(), CLUSTER, false, now);
        assert!(matches!(gone, Err(AuthorityError::Missing { .. })));
    }

    #[test]
    fn the_admins_credentials_are_kept_until_they_are_about_to_end() {
        let dir = tempfile::tempdir().unwrap();
        let now = Clock::start().now();
        let made = Certificates::open(dir.path(), CLUSTER, true, now).unwrap();
        let admin = dir.path().join("admin");
        let name: UserName = "anna".parse().unwrap();
        let write = |port: u16, at| {
            let endpoint: Endpoint = format!("127.0.0.1:{port}").parse().unwrap();
            made.write_admin(&admin, &name, &[endpoint], at).unwrap();
            Credentials::load(&admin).unwrap()
        };
        let first = write(1, now);
        assert_eq!(first.identity, Identity::User(name.clone()));
        assert_eq!(write(1, now).cert_pem, first.cert_pem);
        let moved = write(2, now);
        assert_eq!(moved.cert_pem, first.cert_pem);
        assert_eq!(moved.endpoints, ["127.0.0.1:2".parse().unwrap()]);
        let late = now.after(USER_VALIDITY - ADMIN_RENEWAL);
        assert_ne!(write(2, late).cert_pem, first.cert_pem);
    }

    #[test]
    fn only_a_real_certificate_request_passes() {
        let dir = tempfile::tempdir().unwrap();
        let now = Clock::start().now();
        let made = Certificates::open(dir.path(), CLUSTER, true, now).unwrap();
        let request = KeyPairPem::generate().unwrap().csr().unwrap();
        made.check_request(&request, now).unwrap();
        let refused = made.check_request("nonsense", now).unwrap_err();
        assert_eq!(
            (refused.code, refused.field.as_deref()),
            (ErrorCode::Invalid, Some("certificate_request"))
        );
    }
}
