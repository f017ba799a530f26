//! `EnrollService`: a token and a certificate request for a certificate, and a new certificate for whoever has one. The
//! only service that answers without a certificate, so it gives away nothing and works little.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tonic::{Request, Response, Status};
use trainyard_common::error::{ErrorCode, Refusal};
use trainyard_common::ids::{Digest, TokenId};
use trainyard_common::record::TokenGrant;
use trainyard_common::time::Timestamp;
use trainyard_coordinator_core::effect::Answer;
use trainyard_coordinator_core::event::Event;
use trainyard_proto::{convert, v1};
use trainyard_transport::identity::Identity;
use trainyard_transport::token::secret_hash;

use super::{Shared, reply, unexpected};
use crate::auth::{self, Caller};
use crate::disk::RESERVE_FOR_STATE;

/// Enrolments that may fail within a second, all callers together. A secret has 256 random bits, so this protects not
/// the secret but the coordinator's time.
const MAX_FAILURES_PER_SECOND: u32 = 50;

/// Counts failed enrolments.
#[derive(Debug, Default)]
pub(crate) struct FailureLimit(Mutex<(Timestamp, u32)>);

impl FailureLimit {
    /// Refuses if too many failed within the current second.
    fn check(&self, now: Timestamp) -> Result<(), Refusal> {
        let (begin, count) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if count < MAX_FAILURES_PER_SECOND || now.since(begin) >= Duration::from_secs(1) {
            return Ok(());
        }
        let message = "too many enrolments failed just now; try again in a second";
        Err(Refusal::new(
            ErrorCode::Unavailable,
            "TOO_MANY_FAILURES",
            message,
        ))
    }

    fn count(&self, now: Timestamp) {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if now.since(window.0) >= Duration::from_secs(1) {
            *window = (now, 0);
        }
        window.1 = window.1.saturating_add(1);
    }
}

/// `EnrollService`.
pub(crate) struct EnrollApi(pub(crate) Arc<Shared>);

impl EnrollApi {
    async fn enroll(&self, request: v1::EnrollRequest) -> Result<v1::EnrollResponse, Refusal> {
        self.0.failures.check(self.0.driver.now())?;
        let result = self.try_enroll(request).await;
        if let Err(refusal) = &result
            && refusal.code != ErrorCode::Unavailable
        {
            self.0.failures.count(self.0.driver.now());
            tracing::info!(reason = refusal.reason, "an enrolment was refused");
        }
        result
    }

    async fn try_enroll(&self, request: v1::EnrollRequest) -> Result<v1::EnrollResponse, Refusal> {
        let v1::EnrollRequest {
            token,
            secret,
            certificate_request,
            name,
        } = request;
        self.0.disk.check(RESERVE_FOR_STATE, 0)?;
        // Before the token is used: a request that cannot be signed must not cost one of its uses.
        self.0
            .certificates
            .check_request(&certificate_request, self.0.driver.now())?;
        let identity = self
            .redeem(TokenId(token), Digest(secret_hash(&secret)), name)
            .await?;
        let issued =
            self.0
                .certificates
                .issue(&certificate_request, &identity, self.0.driver.now())?;
        tracing::info!(%identity, serial = issued.serial, "enrolled");
        use v1::enroll_response::Identity as Wire;
        Ok(v1::EnrollResponse {
            certificate: issued.pem,
            ca: self.0.certificates.ca_pem().to_owned(),
            cluster: self.0.cluster.0.to_vec(),
            not_after: Some(convert::timestamp(issued.not_after)),
            identity: match identity {
                Identity::Node(node) => Some(Wire::Node(node.0)),
                Identity::User(name) => Some(Wire::User(name.to_string())),
                Identity::Coordinator => None,
            },
        })
    }

    /// Uses the token once. Which kind it is is looked up; an unknown one goes to the core like any other, so that all
    /// bad tokens get the same answer.
    async fn redeem(
        &self,
        token: TokenId,
        secret_hash: Digest,
        name: String,
    ) -> Result<Identity, Refusal> {
        let is_user = {
            let tables = self.0.read.tables();
            tables
                .tokens
                .get(&token)
                .is_some_and(|token| matches!(token.grant, TokenGrant::User { .. }))
        };
        let answer = if is_user {
            self.0
                .driver
                .request(|key| Event::UserEnrolled {
                    key,
                    token,
                    secret_hash,
                })
                .await?
        } else {
            self.0
                .driver
                .request(|key| Event::NodeEnrolled {
                    key,
                    token,
                    secret_hash,
                    name,
                })
                .await?
        };
        match answer {
            Answer::NodeEnrolled(node) => Ok(Identity::Node(node.id)),
            Answer::UserEnrolled(user) => Ok(Identity::User(user.name)),
            other => Err(unexpected(&other)),
        }
    }

    fn renew(&self, request: &Request<v1::RenewRequest>) -> Result<v1::RenewResponse, Refusal> {
        let identity = match auth::caller(request)? {
            Caller::User(user) => Identity::User(user.name.clone()),
            Caller::Node(node) => Identity::Node(node),
            Caller::Anonymous => {
                let message = "certificate required; run yard login or yard join";
                return Err(Refusal::new(
                    ErrorCode::Unauthenticated,
                    "CERTIFICATE_REQUIRED",
                    message,
                ));
            }
        };
        let csr = &request.get_ref().certificate_request;
        let issued = self
            .0
            .certificates
            .issue(csr, &identity, self.0.driver.now())?;
        tracing::info!(%identity, serial = issued.serial, "certificate renewed");
        Ok(v1::RenewResponse {
            certificate: issued.pem,
            ca: self.0.certificates.ca_pem().to_owned(),
            not_after: Some(convert::timestamp(issued.not_after)),
        })
    }
}

#[tonic::async_trait]
impl v1::enroll_service_server::EnrollService for EnrollApi {
    async fn enroll(
        &self,
        request: Request<v1::EnrollRequest>,
    ) -> Result<Response<v1::EnrollResponse>, Status> {
        reply(EnrollApi::enroll(self, request.into_inner()).await)
    }

    async fn renew(
        &self,
        request: Request<v1::RenewRequest>,
    ) -> Result<Response<v1::RenewResponse>, Status> {
        reply(EnrollApi::renew(self, &request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_limited_per_second() {
        let limit = FailureLimit::default();
        let start = Timestamp(1_000_000);
        for _ in 0..MAX_FAILURES_PER_SECOND {
            limit.check(start).unwrap();
            limit.count(start);
        }
        assert_eq!(limit.check(start).unwrap_err().code, ErrorCode::Unavailable);
        limit.check(Timestamp(start.0 + 1000)).unwrap();
    }
}
