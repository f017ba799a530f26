//! `yard token` and `yard login`.

use std::io::Read;
use std::net::IpAddr;
use std::process::ExitCode;

use serde_json::{Value, json};
use trainyard_common::ids::TokenId;
use trainyard_common::limits;
use trainyard_common::record::{Role, Target, TokenGrant};
use trainyard_common::time::Timestamp;
use trainyard_proto::convert;
use trainyard_proto::v1;
use trainyard_transport::clock::wall_now;
use trainyard_transport::credentials::Credentials;
use trainyard_transport::endpoint::Endpoint;
use trainyard_transport::enrol;
use trainyard_transport::identity::Identity;
use trainyard_transport::skew;
use trainyard_transport::token::{JoinToken, Secret, TokenKind};

use crate::args::{Global, LoginArgs, TokenArgs, TokenCommand, TokenCreateArgs, TokenSource};
use crate::connection::{self, Connection};
use crate::context;
use crate::failure::{EXIT_INTERNAL, EXIT_REFUSED, Failure};
use crate::jobs::unreadable;
use crate::logs::local_time;
use crate::output;
use crate::paths::Paths;
use crate::spec::{count, duration, within};

/// A token's text is far shorter; more is surely another file.
const MAX_TOKEN_FILE_BYTES: u64 = 64 << 10;

/// A token as users see it: everything but the secret's hash.
#[derive(Debug, Clone)]
pub(crate) struct TokenView {
    pub(crate) id: TokenId,
    pub(crate) grant: TokenGrant,
    pub(crate) created_by: String,
    pub(crate) workspace: String,
    pub(crate) created_at: Timestamp,
    pub(crate) expires_at: Timestamp,
    pub(crate) uses_left: u32,
    pub(crate) revoked: bool,
}

impl TokenView {
    fn new(token: v1::Token) -> Result<Self, Failure> {
        let v1::Token {
            id,
            secret_hash: _,
            grant,
            created_by,
            workspace,
            created_at,
            expires_at,
            uses_left,
            revoked,
        } = token;
        Ok(Self {
            id: TokenId(id),
            grant: convert::required("grant", grant).map_err(unreadable)?,
            created_by,
            workspace,
            created_at: convert::to_timestamp("created_at", created_at).map_err(unreadable)?,
            expires_at: convert::to_timestamp("expires_at", expires_at).map_err(unreadable)?,
            uses_left,
            revoked,
        })
    }
}

/// Makes, lists and revokes tokens.
pub(crate) async fn token(global: &Global, args: TokenArgs) -> Result<ExitCode, Failure> {
    match args.command {
        TokenCommand::Create(args) => create(global, args).await,
        TokenCommand::List(args) => {
            let connection = connection::connect(global).await?;
            let answer = connection
                .admin()
                .list_tokens(v1::ListTokensRequest {})
                .await?
                .into_inner();
            let tokens = answer
                .tokens
                .into_iter()
                .map(TokenView::new)
                .collect::<Result<Vec<_>, _>>()?;
            if args.json {
                output::line(
                    &json!({ "tokens": tokens.iter().map(crate::json::token).collect::<Value>() })
                        .to_string(),
                );
            } else if tokens.is_empty() {
                output::note("there are no tokens that can be used");
            } else {
                let rows = tokens.iter().map(row).collect();
                output::line(&output::table(
                    &["ID", "FOR", "USES LEFT", "EXPIRES", "MADE BY", "STATE"],
                    rows,
                ));
            }
            Ok(ExitCode::SUCCESS)
        }
        TokenCommand::Revoke(args) => {
            let connection = connection::connect(global).await?;
            connection
                .admin()
                .revoke_token(v1::RevokeTokenRequest {
                    token: args.token.0,
                })
                .await?;
            if args.json {
                output::line(&json!({ "token": args.token, "done": "revoked" }).to_string());
            } else {
                output::line(&format!("{} revoked", args.token));
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn row(token: &TokenView) -> Vec<String> {
    let what = match &token.grant {
        TokenGrant::Node { .. } => "a node".to_owned(),
        TokenGrant::User { name, role } => format!("user {name} ({role})"),
    };
    vec![
        token.id.to_string(),
        what,
        token.uses_left.to_string(),
        local_time(token.expires_at),
        token.created_by.to_string(),
        if token.revoked {
            "revoked".to_owned()
        } else {
            String::new()
        },
    ]
}

async fn create(global: &Global, args: TokenCreateArgs) -> Result<ExitCode, Failure> {
    let grant = match args.user {
        Some(name) => {
            let role = args.role.as_deref().map_or(Ok(Role::User), str::parse);
            TokenGrant::User {
                name,
                role: role.map_err(|error| Failure::usage("--role", error))?,
            }
        }
        None => TokenGrant::Node {
            target: Target::Attached,
        },
    };
    let uses = count("--uses", Some(&args.uses), 1, 1, limits::MAX_TOKEN_USES)?;
    let ttl = within(
        "--ttl",
        duration("--ttl", &args.ttl)?,
        limits::MIN_TOKEN_TTL..=limits::MAX_TOKEN_TTL,
    )?;
    let connection = connection::connect(global).await?;
    let (record, token) = make(&connection, &grant, uses, ttl).await?;
    if args.json {
        let mut value = crate::json::token(&record);
        if let Value::Object(object) = &mut value {
            object.insert("token".into(), token.to_string().into());
        }
        output::line(&value.to_string());
        return Ok(ExitCode::SUCCESS);
    }
    let how = match grant {
        TokenGrant::Node { .. } => "on the machine: yard join TOKEN",
        TokenGrant::User { .. } => "on the user's machine: yard login TOKEN",
    };
    let many = if uses > 1 {
        "; as it can be used again, give it by standard input: yard join -"
    } else {
        ""
    };
    output::note(&format!(
        "{how} (until {}, {uses} use{}){many}",
        local_time(record.expires_at),
        if uses == 1 { "" } else { "s" }
    ));
    let only_here = |endpoint: &Endpoint| {
        let host = endpoint.host();
        host == "localhost"
            || host
                .parse::<IpAddr>()
                .is_ok_and(|address| address.is_loopback())
    };
    if token.endpoints.iter().all(only_here) {
        output::warning(
            "this cluster listens on this machine only, so the token is of no use elsewhere; start the cluster with \
             `yard up --listen 0.0.0.0:7443` to let others in",
        );
    }
    output::line(&token.to_string());
    Ok(ExitCode::SUCCESS)
}

/// Makes a token.
pub(crate) async fn make(
    connection: &Connection,
    grant: &TokenGrant,
    uses: u32,
    ttl: std::time::Duration,
) -> Result<(TokenView, JoinToken), Failure> {
    let request = v1::CreateTokenRequest {
        grant: Some(v1::TokenGrant::from(grant)),
        uses,
        ttl: Some(trainyard_proto::convert::duration(ttl)),
    };
    let v1::CreateTokenResponse {
        token,
        secret,
        endpoints,
        ca_hash,
        cluster,
    } = connection.admin().create_token(request).await?.into_inner();
    let bad = |what: &str| {
        Failure::new(
            EXIT_INTERNAL,
            "BAD_ANSWER",
            format!("the coordinator's answer holds no good {what}"),
        )
    };
    let record = TokenView::new(token.ok_or_else(|| bad("token"))?)?;
    let token = JoinToken {
        endpoints: endpoints
            .iter()
            .map(|text| text.parse())
            .collect::<Result<_, _>>()
            .map_err(|_| bad("endpoint"))?,
        ca_hash: ca_hash.try_into().map_err(|_| bad("CA hash"))?,
        cluster: cluster
            .as_slice()
            .try_into()
            .map_err(|_| bad("cluster id"))?,
        kind: match grant {
            TokenGrant::Node { .. } => TokenKind::Node,
            TokenGrant::User { .. } => TokenKind::User,
        },
        id: record.id,
        secret: Secret::from_bytes(secret.try_into().map_err(|_| bad("secret"))?),
        reusable: uses > 1,
    };
    Ok((record, token))
}

/// Reads a token from where the user put it. One that can be used again is not taken from an argument, where every
/// process of the machine can read it.
pub(crate) fn read_token(source: &TokenSource, wanted: TokenKind) -> Result<JoinToken, Failure> {
    let mut from_argument = false;
    let text = match (&source.token_file, &source.token) {
        (Some(path), _) => {
            let file = std::fs::File::open(path)
                .map_err(|error| Failure::path("read the token from", path, &error))?;
            read_text(file).map_err(|error| Failure::path("read the token from", path, &error))?
        }
        (None, Some(dash)) if dash == "-" => read_text(std::io::stdin())
            .map_err(|error| Failure::io("read the token from standard input", &error))?,
        (None, Some(text)) => {
            from_argument = true;
            text.clone()
        }
        (None, None) => {
            return Err(Failure::usage(
                "TOKEN",
                "give a token, - for standard input, or --token-file",
            ));
        }
    };
    let token: JoinToken = text
        .parse()
        .map_err(|error| Failure::invalid("TOKEN", error))?;
    if from_argument && token.reusable {
        return Err(Failure::new(
            EXIT_REFUSED,
            "TOKEN_IN_ARGUMENT",
            "this token can be used again, and other users of this machine can see arguments; give it by standard input \
             (`-`) or with --token-file",
        ));
    }
    match (wanted, token.kind) {
        (TokenKind::Node, TokenKind::User) => Err(Failure::invalid(
            "TOKEN",
            "this token is for a user: use yard login",
        )),
        (TokenKind::User, TokenKind::Node) => Err(Failure::invalid(
            "TOKEN",
            "this token is for a machine: use yard join",
        )),
        (TokenKind::Node, TokenKind::Node) | (TokenKind::User, TokenKind::User) => Ok(token),
    }
}

fn read_text(from: impl Read) -> std::io::Result<String> {
    let mut text = String::new();
    from.take(MAX_TOKEN_FILE_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

/// Enrols a user and makes the new context the current one.
pub(crate) async fn login(global: &Global, args: LoginArgs) -> Result<ExitCode, Failure> {
    let paths = Paths::new(global)?;
    let token = read_token(&args.source, TokenKind::User)?;
    // The name is checked before the token is used up.
    if let Some(name) = &args.name {
        context::directory(&paths, name)?;
    }
    let credentials = enrol::enrol(&token, "")
        .await
        .map_err(|error| enrol_failure(&error))?;
    warn_of_skew(&credentials);
    let user = match &credentials.identity {
        Identity::User(user) => user.to_string(),
        Identity::Node(_) | Identity::Coordinator => {
            return Err(Failure::new(
                EXIT_INTERNAL,
                "BAD_ANSWER",
                "the coordinator gave an identity that is not a user's",
            ));
        }
    };
    let name = args.name.unwrap_or_else(|| user.clone());
    let dir = context::directory(&paths, &name)?;
    credentials
        .save(&dir)
        .map_err(|error| Failure::chain(crate::failure::EXIT_IO, "CREDENTIALS", &error))?;
    context::make_current(&paths, &name)?;
    let endpoints: Vec<_> = credentials
        .endpoints
        .iter()
        .map(ToString::to_string)
        .collect();
    output::line(&format!(
        "you are {user} in cluster {} at {}; context {name} is now in use",
        credentials.cluster,
        endpoints.join(", ")
    ));
    Ok(ExitCode::SUCCESS)
}

/// Warns if this machine's clock and the coordinator's, which dated the certificate just now, disagree.
pub(crate) fn warn_of_skew(credentials: &Credentials) {
    let Ok(certificate) = credentials.client_cert() else {
        return;
    };
    let theirs = skew::issued_at(&certificate.info());
    if let Some(skew) = skew::between(wall_now(), theirs) {
        output::note(&skew);
    }
}

/// Why an enrolment failed, with its exit code.
pub(crate) fn enrol_failure(error: &enrol::EnrolError) -> Failure {
    match error {
        enrol::EnrolError::Connect(error) => error.clone().into(),
        enrol::EnrolError::Refused(refusal) => refusal.clone().into(),
        error => Failure::chain(EXIT_INTERNAL, "ENROL", error),
    }
}
