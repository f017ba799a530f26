//! Join tokens: the one line that lets a machine or a user enrol.
//!
//! `yard1.<base64url of JSON>.<checksum>`. It carries where the coordinator is, the hash of its authority (so that the
//! secret is never sent to anybody else), and an id and a secret. The coordinator keeps only [`secret_hash`]. Nothing
//! here prints the secret but `Display` of the token itself, and no error contains it.

use std::fmt;
use std::str::FromStr;

use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use serde::{Deserialize, Serialize};
use trainyard_common::ids::{ClusterId, TokenId};

use crate::endpoint::{Endpoint, InvalidEndpoint};

/// Endpoints of one coordinator that a token or context may list: several heads, each with a name or two.
pub const MAX_ENDPOINTS: usize = 8;
/// Characters of a token: eight long host names, the rest, and base64.
pub const MAX_TOKEN_CHARS: usize = 4096;

const PREFIX: &str = "yard1";
/// Keeps these hashes apart from all other uses of BLAKE3.
const SECRET_CONTEXT: &str = "trainyard.v1 join token secret";
const CHECKSUM_CONTEXT: &str = "trainyard.v1 join token checksum";

/// Whom a token enrols.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenKind {
    /// A machine: `yard join`.
    Node,
    /// A user: `yard login`.
    User,
}

/// 256 random bits that prove the right to enrol. `Debug` does not show them.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

impl Secret {
    /// A new one.
    ///
    /// # Errors
    /// If the system gives no random numbers.
    pub fn generate() -> Result<Self, crate::pki::PkiError> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(|_| crate::pki::PkiError::Random)?;
        Ok(Self(bytes))
    }

    /// One that was received in an enrolment.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// To send in an enrolment, after the peer was verified.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// What the coordinator stores: a one-way hash. The secret is random, so no slow hash is needed.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        blake3::derive_key(SECRET_CONTEXT, &self.0)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The hash of a received secret of any length; only one of 32 bytes can match a stored one.
#[must_use]
pub fn secret_hash(secret: &[u8]) -> [u8; 32] {
    blake3::derive_key(SECRET_CONTEXT, secret)
}

/// Whether two hashes are equal, in time that does not depend on where they differ.
#[must_use]
pub fn hashes_equal(one: &[u8; 32], other: &[u8; 32]) -> bool {
    blake3::Hash::from_bytes(*one) == blake3::Hash::from_bytes(*other)
}

/// A join token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Where the coordinator is: 1 to [`MAX_ENDPOINTS`], tried in this order.
    pub endpoints: Vec<Endpoint>,
    /// [`crate::pki::Authority::hash`] of the cluster's authority.
    pub ca_hash: [u8; 32],
    /// The cluster.
    pub cluster: ClusterId,
    /// Whom it enrols.
    pub kind: TokenKind,
    /// Its public name.
    pub id: TokenId,
    /// The secret.
    pub secret: Secret,
    /// Whether it can be used more than once, and so must not be shown where other users of a machine can look.
    pub reusable: bool,
}

/// The JSON inside; short names keep the line short.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    e: Vec<String>,
    h: String,
    c: ClusterId,
    k: TokenKind,
    i: u64,
    s: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    r: bool,
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let body = Body {
            e: self.endpoints.iter().map(ToString::to_string).collect(),
            h: HEXLOWER.encode(&self.ca_hash),
            c: self.cluster,
            k: self.kind,
            i: self.id.0,
            s: BASE64URL_NOPAD.encode(&self.secret.0),
            r: self.reusable,
        };
        let json = serde_json::to_vec(&body).map_err(|_| fmt::Error)?;
        let body = BASE64URL_NOPAD.encode(&json);
        write!(f, "{PREFIX}.{body}.{}", checksum(&body))
    }
}

impl FromStr for JoinToken {
    type Err = InvalidToken;

    /// Reads a token; white space around it is allowed, as it often comes from a file or a chat.
    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let text = text.trim();
        if text.len() > MAX_TOKEN_CHARS {
            return Err(InvalidToken::TooLong);
        }
        let body: Body = serde_json::from_slice(&unwrap(text)?).map_err(|_| InvalidToken::Body)?;
        body.try_into()
    }
}

impl TryFrom<Body> for JoinToken {
    type Error = InvalidToken;

    fn try_from(body: Body) -> Result<Self, InvalidToken> {
        if body.e.is_empty() || body.e.len() > MAX_ENDPOINTS {
            return Err(InvalidToken::EndpointCount);
        }
        let endpoints = body
            .e
            .iter()
            .map(|text| text.parse())
            .collect::<Result<_, _>>()?;
        let ca_hash = decode32(HEXLOWER.decode(body.h.as_bytes()))?;
        let secret = Secret(decode32(BASE64URL_NOPAD.decode(body.s.as_bytes()))?);
        Ok(Self {
            endpoints,
            ca_hash,
            cluster: body.c,
            kind: body.k,
            id: TokenId(body.i),
            secret,
            reusable: body.r,
        })
    }
}

/// Why a text is not a join token. It never contains any of the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidToken {
    /// It is something else.
    #[error("this is not a join token: a join token begins with `yard1.`")]
    Prefix,
    /// It is a token of another version of Trainyard.
    #[error(
        "this join token was made by another version of Trainyard (it begins with `{found}.`, this version reads \
         `yard1.`): use the version of the coordinator"
    )]
    Version {
        /// The prefix found: `yard` and digits.
        found: String,
    },
    /// Its end is missing.
    #[error("the join token is truncated: copy the whole line")]
    Truncated,
    /// A character was changed, or its end is missing.
    #[error("the join token is damaged (its checksum is wrong): copy the whole line again")]
    Checksum,
    /// It is far longer than any token.
    #[error("the join token is longer than {MAX_TOKEN_CHARS} characters")]
    TooLong,
    /// The checksum is right, but the content is not that of a token.
    #[error("the content of the join token cannot be read: ask for a new one")]
    Body,
    /// It lists no endpoint or too many.
    #[error("the join token must list 1 to {MAX_ENDPOINTS} endpoints")]
    EndpointCount,
    /// It lists something that is not an endpoint.
    #[error("the join token lists a bad endpoint: {0}")]
    Endpoint(InvalidEndpoint),
}

impl From<InvalidEndpoint> for InvalidToken {
    fn from(error: InvalidEndpoint) -> Self {
        Self::Endpoint(error)
    }
}

/// The JSON, after prefix and checksum were checked.
fn unwrap(text: &str) -> Result<Vec<u8>, InvalidToken> {
    let (prefix, rest) = text.split_once('.').unwrap_or((text, ""));
    if prefix != PREFIX {
        return Err(other_prefix(prefix));
    }
    let (body, sum) = rest.split_once('.').ok_or(InvalidToken::Truncated)?;
    if sum.len() < 8 {
        return Err(InvalidToken::Truncated);
    }
    if sum != checksum(body) {
        return Err(InvalidToken::Checksum);
    }
    BASE64URL_NOPAD
        .decode(body.as_bytes())
        .map_err(|_| InvalidToken::Body)
}

fn other_prefix(prefix: &str) -> InvalidToken {
    match prefix.strip_prefix("yard") {
        Some(digits) if (1..=4).contains(&digits.len()) && is_digits(digits) => {
            InvalidToken::Version {
                found: prefix.to_owned(),
            }
        }
        _ => InvalidToken::Prefix,
    }
}

fn is_digits(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Against typing and copying errors, not against people.
fn checksum(body: &str) -> String {
    let hash = blake3::derive_key(CHECKSUM_CONTEXT, body.as_bytes());
    HEXLOWER.encode(&hash[..4])
}

fn decode32(bytes: Result<Vec<u8>, data_encoding::DecodeError>) -> Result<[u8; 32], InvalidToken> {
    bytes
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or(InvalidToken::Body)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            endpoints: vec![
                "head.example.org:7443".parse().unwrap(),
                "[::1]:1".parse().unwrap(),
            ],
            ca_hash: [3; 32],
            cluster: ClusterId([4; 16]),
            kind: TokenKind::Node,
            id: TokenId(17),
            secret: Secret([0xc5; 32]),
            reusable: false,
        }
    }

    fn wrap(json: &str) -> String {
        let body = BASE64URL_NOPAD.encode(json.as_bytes());
        format!("yard1.{body}.{}", checksum(&body))
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let text = token().to_string();
        let err = |text: &str| text.parse::<JoinToken>().unwrap_err();
        assert_eq!(err(""), InvalidToken::Prefix);
        assert_eq!(err("K10abc::node"), InvalidToken::Prefix);
        assert_eq!(err("yard.x.y"), InvalidToken::Prefix);
        assert_eq!(
            err(&text.replace("yard1", "yard2")),
            InvalidToken::Version {
                found: "yard2".into()
            }
        );
        assert_eq!(err(&text[..40]), InvalidToken::Truncated);
        assert_eq!(err(&text[..text.len() - 1]), InvalidToken::Truncated);
        assert_eq!(err(&format!("{text}0")), InvalidToken::Checksum);
        assert_eq!(
            err(&format!("yard1.{}", "a".repeat(5000))),
            InvalidToken::TooLong
        );
        assert_eq!(err(&wrap("{}")), InvalidToken::Body);
        assert_eq!(format!(" {text}\n").parse(), Ok(token()));
    }

    #[test]
    fn unknown_and_bad_fields_are_refused() {
        let text = token().to_string();
        let body = text.split('.').nth(1).unwrap();
        let json = String::from_utf8(BASE64URL_NOPAD.decode(body.as_bytes()).unwrap()).unwrap();
        assert_eq!(wrap(&json).parse(), Ok(token()));
        let err = |json: &str| wrap(json).parse::<JoinToken>().unwrap_err();
        assert_eq!(
            err(&json.replace("\"i\":17", "\"i\":17,\"x\":1")),
            InvalidToken::Body
        );
        assert_eq!(
            err(&json.replace("\"i\":17", "\"i\":-1")),
            InvalidToken::Body
        );
        assert_eq!(err(&json.replace("node", "admin")), InvalidToken::Body);
        assert_eq!(err(&json.replace("0303", "03")), InvalidToken::Body);
        assert_eq!(
            err(&json.replace("\"head.example.org:7443\",\"[::1]:1\"", "")),
            InvalidToken::EndpointCount
        );
        let many = ["\"a:1\""; 9].join(",");
        assert_eq!(
            err(&json.replace("\"head.example.org:7443\",\"[::1]:1\"", &many)),
            InvalidToken::EndpointCount
        );
        assert!(matches!(
            err(&json.replace("head.example.org:7443", "http://x")),
            InvalidToken::Endpoint(_)
        ));
    }

    #[test]
    fn attack_b13_the_secret_is_shown_by_nothing_but_the_token_itself() {
        let token = token();
        let text = token.to_string();
        let secret = BASE64URL_NOPAD.encode(&token.secret.0);
        let mut shown = vec![format!("{token:?}"), format!("{:#?}", token.secret)];
        for end in 0..text.len() {
            let error = text[..end].parse::<JoinToken>().unwrap_err();
            shown.push(format!("{error:?} {error}"));
        }
        let body = text.split('.').nth(1).unwrap();
        for shown in shown {
            assert!(
                !shown.contains(&secret) && !shown.contains("197"),
                "{shown}"
            );
            assert!(!shown.contains(&body[..16]), "{shown}");
        }
    }

    #[test]
    fn hashes_are_of_the_secret_and_compare() {
        let secret = Secret::generate().unwrap();
        assert_ne!(secret, Secret::generate().unwrap());
        assert!(hashes_equal(
            &secret.hash(),
            &secret_hash(secret.as_bytes())
        ));
        assert!(!hashes_equal(
            &secret.hash(),
            &secret_hash(&secret.as_bytes()[..31])
        ));
        assert_ne!(&secret.hash(), secret.as_bytes());
    }

    #[test]
    fn the_largest_token_fits() {
        let host = format!(
            "{}.{}.{}.{}",
            "a".repeat(63),
            "b".repeat(63),
            "c".repeat(63),
            "d".repeat(61)
        );
        let mut token = token();
        token.endpoints = vec![format!("{host}:65535").parse().unwrap(); MAX_ENDPOINTS];
        token.id = TokenId(u64::MAX);
        assert_eq!(token.to_string().parse(), Ok(token));
    }

    proptest! {
        #[test]
        fn tokens_survive_their_text(
            hosts in prop::collection::vec(("[a-z][a-z0-9-]{0,20}[a-z0-9]", 1u16..), 1..=MAX_ENDPOINTS),
            ca_hash: [u8; 32], cluster: [u8; 16], id: u64, secret: [u8; 32], user: bool,
        ) {
            let token = JoinToken {
                endpoints: hosts.iter().map(|(h, p)| format!("{h}:{p}").parse().unwrap()).collect(),
                ca_hash,
                cluster: ClusterId(cluster),
                kind: if user { TokenKind::User } else { TokenKind::Node },
                id: TokenId(id),
                secret: Secret(secret),
                reusable: secret[0] % 2 == 1,
            };
            prop_assert_eq!(token.to_string().parse(), Ok(token));
        }

        #[test]
        fn any_changed_character_is_noticed(at: prop::sample::Index, to in "[A-Za-z0-9._-]") {
            let text = token().to_string();
            let at = at.index(text.len());
            let changed = format!("{}{}{}", &text[..at], to, &text[at + 1..]);
            prop_assert_eq!(changed.parse::<JoinToken>().is_ok(), changed == text);
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,80}") {
            let _ = text.parse::<JoinToken>();
            let _ = format!("yard1.{text}").parse::<JoinToken>();
            let _ = wrap(&text).parse::<JoinToken>();
        }
    }
}
