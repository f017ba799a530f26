//! `AgentService`: where the streams of agents come in. What is done with them is in `session` and `push_logs`.

use std::sync::Arc;

use tonic::{Request, Response, Status, Streaming};
use trainyard_proto::status::to_status;
use trainyard_proto::v1;

use super::push_logs::Pushing;
use super::session::Session;
use super::{Answers, Shared, answers};
use crate::auth;
use trainyard_transport::task::spawn;

/// `AgentService`.
pub(crate) struct AgentApi(pub(crate) Arc<Shared>);

#[tonic::async_trait]
impl v1::agent_service_server::AgentService for AgentApi {
    type SessionStream = Answers<v1::CoordinatorMessage>;
    type PushLogsStream = Answers<v1::PushLogsResponse>;

    async fn session(
        &self,
        request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let refused = |refusal| to_status(&refusal);
        let node = auth::node(&request).map_err(refused)?;
        let peer = auth::peer(&request).map_err(refused)?;
        // The answer begins at once and a refusal comes inside it, so that the order in which an agent sends its first
        // message and waits for the headers does not matter.
        let (sender, answers) = answers();
        let session = Session {
            shared: self.0.clone(),
            node,
            peer,
            sender,
        };
        spawn("session", session.run(request.into_inner()));
        Ok(Response::new(answers))
    }

    async fn push_logs(
        &self,
        request: Request<Streaming<v1::PushLogsRequest>>,
    ) -> Result<Response<Self::PushLogsStream>, Status> {
        let node = auth::node(&request).map_err(|refusal| to_status(&refusal))?;
        let (sender, answers) = answers();
        let pushing = Pushing::new(self.0.clone(), node, sender);
        spawn("push logs", pushing.run(request.into_inner()));
        Ok(Response::new(answers))
    }
}
