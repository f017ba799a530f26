//! `AdminService`: join tokens, who the caller is, and trouble on purpose. A token's secret is drawn here, is in the one answer, and nothing
//! but its hash goes any further.

use std::sync::Arc;

use tonic::{Request, Response, Status};
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::Digest;
use trainyard_coordinator_core::effect::Answer;
use trainyard_coordinator_core::event::Event;
use trainyard_proto::{PROTOCOL_VERSION, convert, v1};
use trainyard_transport::token::Secret;

use super::{Shared, faults, reply, unexpected};
use crate::auth::{self, Caller};
use crate::disk::RESERVE_FOR_STATE;

/// `AdminService`.
pub(crate) struct AdminApi(pub(crate) Arc<Shared>);

impl AdminApi {
    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Result<v1::CreateTokenResponse, Refusal> {
        let by = auth::user(&request)?.name.clone();
        self.0.disk.check(RESERVE_FOR_STATE, 0)?;
        let v1::CreateTokenRequest { grant, uses, ttl } = request.into_inner();
        let grant = convert::required("grant", grant)?;
        let ttl = convert::to_duration("ttl", ttl)?;
        let secret = Secret::generate().map_err(|_| no_random())?;
        let secret_hash = Digest(secret.hash());
        let answer = self
            .0
            .driver
            .request(|key| Event::TokenRequested {
                key,
                by,
                secret_hash,
                grant,
                uses,
                ttl,
            })
            .await?;
        let Answer::TokenCreated(token) = answer else {
            return Err(unexpected(&answer));
        };
        Ok(v1::CreateTokenResponse {
            token: Some(convert::without_secret(&token)),
            secret: secret.as_bytes().to_vec(),
            endpoints: self.0.endpoints.iter().map(ToString::to_string).collect(),
            ca_hash: self.0.certificates.ca_hash().to_vec(),
            cluster: self.0.cluster.0.to_vec(),
        })
    }

    fn list_tokens(&self) -> v1::ListTokensResponse {
        let now = self.0.driver.now();
        let tables = self.0.read.tables();
        let usable = tables
            .tokens
            .values()
            .filter(|token| token.expires_at > now);
        v1::ListTokensResponse {
            tokens: usable.map(|token| convert::without_secret(token)).collect(),
        }
    }

    async fn revoke_token(&self, token: u64) -> Result<v1::RevokeTokenResponse, Refusal> {
        let token = convert::token_id("token", token)?;
        match self
            .0
            .driver
            .request(|key| Event::TokenRevoked { key, token })
            .await?
        {
            Answer::Done => Ok(v1::RevokeTokenResponse {}),
            other => Err(unexpected(&other)),
        }
    }

    fn who_am_i(&self, caller: &Caller) -> v1::WhoAmIResponse {
        use v1::who_am_i_response::Identity;
        let identity = match caller {
            Caller::User(user) => Some(Identity::User(user.as_ref().into())),
            Caller::Node(node) => Some(Identity::Node(node.0)),
            Caller::Anonymous => None,
        };
        v1::WhoAmIResponse {
            identity,
            cluster: self.0.cluster.0.to_vec(),
            coordinator_version: env!("CARGO_PKG_VERSION").to_owned(),
            term: self.0.term.0,
            now: Some(convert::timestamp(self.0.driver.now())),
            protocol_version: PROTOCOL_VERSION,
        }
    }
}

fn no_random() -> Refusal {
    Refusal::new(
        ErrorCode::Unavailable,
        "NO_RANDOM",
        "the coordinator's system gives no random numbers",
    )
}

#[tonic::async_trait]
impl v1::admin_service_server::AdminService for AdminApi {
    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Result<Response<v1::CreateTokenResponse>, Status> {
        reply(AdminApi::create_token(self, request).await)
    }

    async fn list_tokens(
        &self,
        _request: Request<v1::ListTokensRequest>,
    ) -> Result<Response<v1::ListTokensResponse>, Status> {
        Ok(Response::new(AdminApi::list_tokens(self)))
    }

    async fn revoke_token(
        &self,
        request: Request<v1::RevokeTokenRequest>,
    ) -> Result<Response<v1::RevokeTokenResponse>, Status> {
        reply(AdminApi::revoke_token(self, request.get_ref().token).await)
    }

    async fn who_am_i(
        &self,
        request: Request<v1::WhoAmIRequest>,
    ) -> Result<Response<v1::WhoAmIResponse>, Status> {
        reply(auth::caller(&request).map(|caller| AdminApi::who_am_i(self, &caller)))
    }

    async fn inject_fault(
        &self,
        request: Request<v1::InjectFaultRequest>,
    ) -> Result<Response<v1::InjectFaultResponse>, Status> {
        reply(faults::inject(&self.0, request).await)
    }
}
