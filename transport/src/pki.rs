//! The cluster's certificate authority, the certificates that it issues, and how they are read back.
//!
//! Every name, purpose and date in a certificate is chosen here. Of a certificate request only the public key counts.
//! Who may have a certificate, and which serials were revoked, is the coordinator's business.

use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use trainyard_common::ids::ClusterId;
use trainyard_common::time::Timestamp;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{Identity, InvalidIdentity, SpiffeId};

/// How long an authority lives. Replacing it means enrolling everything again, so it outlives the machines.
pub const AUTHORITY_VALIDITY: Duration = Duration::from_secs(3652 * 86_400);
/// How long certificates of nodes and users live. Short, so that a revocation list never grows; renewed at half of it.
pub const LEAF_VALIDITY: Duration = Duration::from_secs(86_400);
/// Certificates begin this long before they are issued, for clocks that are a little behind.
pub const CLOCK_SKEW: Duration = Duration::from_secs(300);
/// Bytes of a certificate request in PEM. A P-256 request takes about 500; whatever is larger is not ours.
pub const MAX_CSR_BYTES: usize = 8 << 10;
/// Bytes of certificates in PEM that are read: a chain of a few.
const MAX_CERTIFICATE_PEM_BYTES: usize = 64 << 10;

/// Why keys or certificates could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Making a key, a certificate or a request failed: an own bug or no entropy.
    #[error("cannot make {what}")]
    Make {
        /// What was to be made.
        what: &'static str,
        /// Why not.
        #[source]
        source: rcgen::Error,
    },
    /// No random numbers from the system.
    #[error("the system gives no random numbers")]
    Random,
    /// A certificate cannot be read.
    #[error("cannot read the certificate: {reason}")]
    BadCertificate {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The one URI in a certificate names no identity.
    #[error("the certificate names no identity of a Trainyard cluster")]
    BadIdentity(#[source] InvalidIdentity),
    /// A private key cannot be read.
    #[error("cannot read the private key")]
    BadKey(#[source] rcgen::Error),
    /// The private key belongs to another certificate.
    #[error("the private key does not belong to the certificate")]
    KeyMismatch,
    /// A certificate request is refused.
    #[error("certificate request refused: {reason}")]
    BadRequest {
        /// What is wrong with it, and what is expected.
        reason: &'static str,
    },
    /// A name for the coordinator's certificate is neither a DNS name nor an IP address.
    #[error("{name:?} is neither a DNS name nor an IP address")]
    BadServerName {
        /// The name as given.
        name: String,
    },
}

/// A certificate that was just issued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedCertificate {
    /// The certificate in PEM, without the authority's.
    pub pem: String,
    /// Its serial number in lower-case hex, the name under which it is revoked.
    pub serial: String,
    /// When it ends.
    pub not_after: Timestamp,
}

/// The coordinator's own certificate with its key.
#[derive(Clone)]
pub struct ServerCert {
    /// The leaf and then the authority's certificate, in PEM: enrolling clients know only the latter's hash.
    pub chain_pem: String,
    /// The private key in PEM.
    pub key_pem: String,
    /// When it ends.
    pub not_after: Timestamp,
}

impl fmt::Debug for ServerCert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerCert")
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// The cluster's certificate authority.
pub struct Authority {
    cluster: ClusterId,
    cert_pem: String,
    cert_der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("cluster", &self.cluster)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// A new authority (ECDSA P-256) for `cluster`, valid for [`AUTHORITY_VALIDITY`] from `now` on.
    ///
    /// # Errors
    /// [`PkiError::Make`] or [`PkiError::Random`].
    pub fn create(cluster: ClusterId, now: Timestamp) -> Result<Self, PkiError> {
        let key = generate_key()?;
        let mut params = blank_params(now, AUTHORITY_VALIDITY)?;
        params.distinguished_name = common_name(format!("trainyard cluster {cluster}"));
        // The trust domain without a path, so that the authority's file alone says which cluster it is.
        params.subject_alt_names = vec![uri(&format!("spiffe://{cluster}"))?];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params
            .self_signed(&key)
            .map_err(|source| make("the authority", source))?;
        Ok(Self {
            cluster,
            cert_pem: certificate.pem(),
            cert_der: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        })
    }

    /// The authority from the two texts that [`cert_pem`](Self::cert_pem) and [`key_pem`](Self::key_pem) gave.
    ///
    /// # Errors
    /// If one cannot be read, is no authority of ours, or they do not belong together.
    pub fn load(cert_pem: &str, key_pem: &str) -> Result<Self, PkiError> {
        let cert_der = first_certificate(cert_pem)?;
        let key = KeyPair::from_pem(key_pem).map_err(PkiError::BadKey)?;
        let cluster = {
            let parsed = parse(&cert_der)?;
            if !parsed.is_ca() {
                return Err(bad_certificate("it is not an authority's"));
            }
            if parsed.public_key().raw != key.subject_public_key_info() {
                return Err(PkiError::KeyMismatch);
            }
            authority_cluster(&parsed)?
        };
        let issuer = Issuer::from_ca_cert_der(&cert_der, key)
            .map_err(|_| bad_certificate("it is not an authority's"))?;
        Ok(Self {
            cluster,
            cert_pem: cert_pem.to_owned(),
            cert_der,
            issuer,
        })
    }

    /// The cluster that this authority vouches for.
    #[must_use]
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Its certificate, for everybody.
    #[must_use]
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// Its private key: whoever has it is the cluster.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// What join tokens carry: BLAKE3 of the certificate in DER.
    ///
    /// The whole certificate, not just its key, so that a match also settles name, dates and constraints.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        certificate_hash(&self.cert_der)
    }

    /// Signs the public key of `csr_pem` into a certificate for `identity`, for client authentication (and, for a
    /// coordinator, server authentication).
    ///
    /// The request's signature proves that its sender holds the key. Its subject, names and extensions are ignored.
    ///
    /// # Errors
    /// [`PkiError::BadRequest`] for everything that is wrong with the request.
    pub fn sign_csr(
        &self,
        csr_pem: &str,
        identity: &Identity,
        validity: Duration,
        now: Timestamp,
    ) -> Result<IssuedCertificate, PkiError> {
        let key = requested_key(csr_pem)?;
        self.sign(&key, identity, Vec::new(), validity, now)
    }

    /// A new key and certificate for the coordinator's own port. `names` are DNS names and IP addresses.
    ///
    /// Our clients check the identity and not the names (see [`crate::client`]); these are for other tools.
    ///
    /// # Errors
    /// [`PkiError::BadServerName`], or [`PkiError::Make`].
    pub fn issue_server(
        &self,
        names: &[String],
        validity: Duration,
        now: Timestamp,
    ) -> Result<ServerCert, PkiError> {
        let key = generate_key()?;
        let names = names
            .iter()
            .map(|name| server_name(name))
            .collect::<Result<_, _>>()?;
        let issued = self.sign(&key, &Identity::Coordinator, names, validity, now)?;
        Ok(ServerCert {
            chain_pem: format!("{}{}", issued.pem, self.cert_pem),
            key_pem: key.serialize_pem(),
            not_after: issued.not_after,
        })
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        identity: &Identity,
        mut names: Vec<SanType>,
        validity: Duration,
        now: Timestamp,
    ) -> Result<IssuedCertificate, PkiError> {
        names.push(uri(&identity.in_cluster(self.cluster).to_string())?);
        let mut params = blank_params(now, validity)?;
        params.distinguished_name = common_name(identity.to_string());
        params.subject_alt_names = names;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = purposes(identity);
        params.use_authority_key_identifier_extension = true;
        let certificate = params
            .signed_by(key, &self.issuer)
            .map_err(|source| make("a certificate", source))?;
        // Read back rather than computed beside, so that the record says what the certificate says.
        let info = inspect(certificate.der())?;
        Ok(IssuedCertificate {
            pem: certificate.pem(),
            serial: info.serial,
            not_after: info.not_after,
        })
    }
}

/// A private key in PEM; `Debug` does not show it.
#[derive(Clone)]
pub struct KeyPairPem(String);

impl fmt::Debug for KeyPairPem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyPairPem(..)")
    }
}

impl KeyPairPem {
    /// A new ECDSA P-256 key.
    ///
    /// # Errors
    /// [`PkiError::Make`].
    pub fn generate() -> Result<Self, PkiError> {
        Ok(Self(generate_key()?.serialize_pem()))
    }

    /// A key from a file. It is checked when it is used.
    #[must_use]
    pub fn from_pem(pem: String) -> Self {
        Self(pem)
    }

    /// The text to store, with [`crate::files::write_private`].
    #[must_use]
    pub fn as_pem(&self) -> &str {
        &self.0
    }

    /// A certificate request for this key in PEM. It asks for no names: the coordinator chooses them.
    ///
    /// # Errors
    /// [`PkiError::BadKey`] or [`PkiError::Make`].
    pub fn csr(&self) -> Result<String, PkiError> {
        let key = KeyPair::from_pem(&self.0).map_err(PkiError::BadKey)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name("trainyard".to_owned());
        params
            .serialize_request(&key)
            .and_then(|request| request.pem())
            .map_err(|source| make("a certificate request", source))
    }
}

/// What a certificate of ours says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateInfo {
    /// Whom it names, and in which cluster.
    pub spiffe: SpiffeId,
    /// Its serial number in lower-case hex.
    pub serial: String,
    /// From when on it counts.
    pub not_before: Timestamp,
    /// When it ends.
    pub not_after: Timestamp,
}

/// Reads a certificate of a coordinator, node or user. It checks no signature.
///
/// # Errors
/// [`PkiError::BadCertificate`], also if it names no or several URIs, or [`PkiError::BadIdentity`].
pub fn inspect(der: &CertificateDer<'_>) -> Result<CertificateInfo, PkiError> {
    let parsed = parse(der)?;
    let spiffe = only_uri(&parsed)?.parse().map_err(PkiError::BadIdentity)?;
    Ok(CertificateInfo {
        spiffe,
        serial: data_encoding::HEXLOWER.encode(&parsed.serial.to_bytes_be()),
        not_before: seconds(parsed.validity().not_before.timestamp()),
        not_after: seconds(parsed.validity().not_after.timestamp()),
    })
}

/// Like [`inspect`], for the first certificate in a PEM text.
///
/// # Errors
/// Like [`inspect`].
pub fn inspect_pem(pem: &str) -> Result<CertificateInfo, PkiError> {
    inspect(&first_certificate(pem)?)
}

/// The hash of an authority's certificate as join tokens carry it; see [`Authority::hash`].
///
/// # Errors
/// [`PkiError::BadCertificate`].
pub fn ca_hash(cert_pem: &str) -> Result<[u8; 32], PkiError> {
    Ok(certificate_hash(&first_certificate(cert_pem)?))
}

/// All certificates of a PEM text, at least one.
pub(crate) fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    if pem.len() > MAX_CERTIFICATE_PEM_BYTES {
        return Err(bad_certificate("the PEM text is longer than 64 KiB"));
    }
    let chain = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| bad_certificate("it is not PEM"))?;
    if chain.is_empty() {
        return Err(bad_certificate("there is no certificate in the PEM text"));
    }
    Ok(chain)
}

pub(crate) fn certificate_hash(der: &CertificateDer<'_>) -> [u8; 32] {
    *blake3::hash(der).as_bytes()
}

fn first_certificate(pem: &str) -> Result<CertificateDer<'static>, PkiError> {
    Ok(certificates(pem)?.swap_remove(0))
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, PkiError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(bad_certificate("there are bytes after it")),
        Err(_) => Err(bad_certificate("it is not X.509")),
    }
}

/// The one URI that a certificate of ours has. With two, a reader might take one and a checker the other.
fn only_uri<'a>(certificate: &X509Certificate<'a>) -> Result<&'a str, PkiError> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| bad_certificate("its names cannot be read"))?
        .ok_or_else(|| bad_certificate("it has no names"))?;
    let mut uris = names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => Ok(uri),
        _ => Err(bad_certificate("it does not have exactly one URI")),
    }
}

fn authority_cluster(certificate: &X509Certificate<'_>) -> Result<ClusterId, PkiError> {
    only_uri(certificate)?
        .strip_prefix("spiffe://")
        .ok_or(PkiError::BadIdentity(InvalidIdentity::Scheme))?
        .parse()
        .map_err(|_| PkiError::BadIdentity(InvalidIdentity::Cluster))
}

/// The public key of a request, if its sender proved to hold it and it is of the one kind that we make.
fn requested_key(csr_pem: &str) -> Result<SubjectPublicKeyInfo, PkiError> {
    if csr_pem.len() > MAX_CSR_BYTES {
        return Err(bad_request("it is longer than 8 KiB"));
    }
    let der = CertificateSigningRequestDer::from_pem_slice(csr_pem.as_bytes())
        .map_err(|_| bad_request("it is not PEM"))?;
    let Ok(([], request)) = X509CertificationRequest::from_der(&der) else {
        return Err(bad_request("it is not PKCS#10"));
    };
    let key = SubjectPublicKeyInfo::from_der(request.certification_request_info.subject_pki.raw)
        .map_err(|_| bad_request("its key is not ECDSA P-256"))?;
    // Before the signature is verified: the kind bounds the work, a huge RSA key would not.
    if key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 {
        return Err(bad_request("its key is not ECDSA P-256"));
    }
    request
        .verify_signature()
        .map_err(|_| bad_request("its signature is wrong"))?;
    Ok(key)
}

fn purposes(identity: &Identity) -> Vec<ExtendedKeyUsagePurpose> {
    match identity {
        Identity::Coordinator => {
            vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ]
        }
        Identity::Node(_) | Identity::User(_) => vec![ExtendedKeyUsagePurpose::ClientAuth],
    }
}

fn generate_key() -> Result<KeyPair, PkiError> {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(|source| make("a key", source))
}

/// Parameters with dates and a random serial, and nothing else.
fn blank_params(now: Timestamp, validity: Duration) -> Result<CertificateParams, PkiError> {
    let now = UNIX_EPOCH + Duration::from_millis(now.0);
    let begin = now.checked_sub(CLOCK_SKEW).unwrap_or(UNIX_EPOCH);
    let mut params = CertificateParams::default();
    params.not_before = SystemTime::into(begin);
    params.not_after = SystemTime::into(now + validity);
    params.serial_number = Some(random_serial()?);
    Ok(params)
}

/// 127 random bits: not guessable, positive and without a leading zero, so that its text is always 32 digits.
fn random_serial() -> Result<SerialNumber, PkiError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|_| PkiError::Random)?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn common_name(name: String) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn uri(text: &str) -> Result<SanType, PkiError> {
    text.try_into()
        .map(SanType::URI)
        .map_err(|source| make("a URI", source))
}

fn server_name(name: &str) -> Result<SanType, PkiError> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let bad = || PkiError::BadServerName {
        name: name.chars().take(64).collect(),
    };
    rustls::pki_types::DnsName::try_from(name).map_err(|_| bad())?;
    name.try_into().map(SanType::DnsName).map_err(|_| bad())
}

fn seconds(unix: i64) -> Timestamp {
    Timestamp(u64::try_from(unix).unwrap_or(0).saturating_mul(1000))
}

fn make(what: &'static str, source: rcgen::Error) -> PkiError {
    PkiError::Make { what, source }
}

fn bad_certificate(reason: &'static str) -> PkiError {
    PkiError::BadCertificate { reason }
}

fn bad_request(reason: &'static str) -> PkiError {
    PkiError::BadRequest { reason }
}

#[cfg(test)]
mod tests {
    use trainyard_common::ids::NodeId;

    use super::*;

    const NOW: Timestamp = Timestamp(1_800_000_000_000);

    fn authority() -> Authority {
        Authority::create(ClusterId([1; 16]), NOW).unwrap()
    }

    fn node() -> Identity {
        Identity::Node(NodeId(7))
    }

    #[test]
    fn an_authority_survives_its_files() {
        let made = authority();
        let loaded = Authority::load(made.cert_pem(), &made.key_pem()).unwrap();
        assert_eq!(loaded.cluster(), ClusterId([1; 16]));
        assert_eq!(loaded.hash(), made.hash());
        assert_eq!(ca_hash(made.cert_pem()).unwrap(), made.hash());
        let csr = KeyPairPem::generate().unwrap().csr().unwrap();
        loaded.sign_csr(&csr, &node(), LEAF_VALIDITY, NOW).unwrap();
    }

    #[test]
    fn foreign_keys_and_leaves_are_no_authority() {
        let one = authority();
        let other = authority();
        assert_ne!(one.hash(), other.hash());
        assert!(matches!(
            Authority::load(one.cert_pem(), &other.key_pem()),
            Err(PkiError::KeyMismatch)
        ));
        let server = one.issue_server(&[], LEAF_VALIDITY, NOW).unwrap();
        assert!(matches!(
            Authority::load(&server.chain_pem, &server.key_pem),
            Err(PkiError::BadCertificate { .. })
        ));
        assert!(Authority::load("", "").is_err());
    }

    #[test]
    fn a_node_certificate_says_what_we_chose() {
        let csr = KeyPairPem::generate().unwrap().csr().unwrap();
        let issued = authority()
            .sign_csr(&csr, &node(), LEAF_VALIDITY, NOW)
            .unwrap();
        let info = inspect_pem(&issued.pem).unwrap();
        assert_eq!(info.spiffe, node().in_cluster(ClusterId([1; 16])));
        assert_eq!(info.not_before, Timestamp(NOW.0 - 300_000));
        assert_eq!(info.not_after, NOW.after(LEAF_VALIDITY));
        assert_eq!(info.not_after, issued.not_after);
        assert_eq!(info.serial, issued.serial);
        assert_eq!(info.serial.len(), 32);
    }

    #[test]
    fn serials_differ() {
        let authority = authority();
        let csr = KeyPairPem::generate().unwrap().csr().unwrap();
        let sign = || {
            authority
                .sign_csr(&csr, &node(), LEAF_VALIDITY, NOW)
                .unwrap()
                .serial
        };
        assert_ne!(sign(), sign());
    }

    #[test]
    fn attack_b08_a_greedy_request_gets_only_what_the_server_chose() {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["coordinator".to_owned()]).unwrap();
        params.distinguished_name = common_name("admin".to_owned());
        params
            .subject_alt_names
            .push(uri("spiffe://evil/coordinator").unwrap());
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let csr = params.serialize_request(&key).unwrap().pem().unwrap();

        let issued = authority()
            .sign_csr(&csr, &node(), LEAF_VALIDITY, NOW)
            .unwrap();
        let der = first_certificate(&issued.pem).unwrap();
        let parsed = parse(&der).unwrap();
        assert!(!parsed.is_ca());
        assert_eq!(parsed.subject().to_string(), "CN=node/7");
        let names = &parsed
            .subject_alternative_name()
            .unwrap()
            .unwrap()
            .value
            .general_names;
        assert_eq!(names.len(), 1);
        let usage = parsed.key_usage().unwrap().unwrap().value;
        assert!(usage.digital_signature() && !usage.key_cert_sign());
        let extended = parsed.extended_key_usage().unwrap().unwrap().value;
        assert!(extended.client_auth && !extended.server_auth && !extended.any);
        assert_eq!(parsed.public_key().raw, key.subject_public_key_info());
    }

    #[test]
    fn requests_with_another_kind_of_key_or_a_wrong_signature_are_refused() {
        let authority = authority();
        let refuse = |csr: &str| match authority.sign_csr(csr, &node(), LEAF_VALIDITY, NOW) {
            Err(PkiError::BadRequest { reason }) => reason,
            other => panic!("{other:?}"),
        };
        let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let csr = CertificateParams::default()
            .serialize_request(&p384)
            .unwrap()
            .pem()
            .unwrap();
        assert_eq!(refuse(&csr), "its key is not ECDSA P-256");

        let key = KeyPair::generate().unwrap();
        let csr = CertificateParams::default()
            .serialize_request(&key)
            .unwrap();
        let mut der = csr.der().to_vec();
        let last = der.len() - 1;
        der[last] ^= 1;
        let broken = format!(
            "-----BEGIN CERTIFICATE REQUEST-----\n{}\n-----END CERTIFICATE REQUEST-----\n",
            data_encoding::BASE64.encode(&der)
        );
        assert_eq!(refuse(&broken), "its signature is wrong");
        assert_eq!(refuse("hello"), "it is not PEM");
        assert_eq!(
            refuse(&"x".repeat(MAX_CSR_BYTES + 1)),
            "it is longer than 8 KiB"
        );
        let key_pem = KeyPairPem::generate().unwrap();
        assert_eq!(refuse(key_pem.as_pem()), "it is not PEM");
    }

    #[test]
    fn server_names_are_dns_names_or_addresses() {
        let authority = authority();
        let names = ["head.example.org", "10.0.0.1", "::1"].map(str::to_owned);
        let server = authority.issue_server(&names, LEAF_VALIDITY, NOW).unwrap();
        let chain = certificates(&server.chain_pem).unwrap();
        assert_eq!(chain.len(), 2);
        assert_eq!(certificate_hash(&chain[1]), authority.hash());
        let info = inspect(&chain[0]).unwrap();
        assert_eq!(info.spiffe.identity, Identity::Coordinator);
        for bad in ["", "a b", "http://x", "x:7443", "é"] {
            let result = authority.issue_server(&[bad.to_owned()], LEAF_VALIDITY, NOW);
            assert!(
                matches!(result, Err(PkiError::BadServerName { .. })),
                "{bad}"
            );
        }
    }

    #[test]
    fn keys_are_not_shown() {
        let key = KeyPairPem::generate().unwrap();
        let server = authority().issue_server(&[], LEAF_VALIDITY, NOW).unwrap();
        for text in [
            format!("{key:?}"),
            format!("{server:?}"),
            format!("{:?}", authority()),
        ] {
            assert!(!text.contains("PRIVATE"), "{text}");
        }
    }
}
