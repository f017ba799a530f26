//! Who gets in and what they may do, over the real wire.

use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use trainyard_common::error::ErrorCode;
use trainyard_proto::v1;
use trainyard_proto::v1::admin_service_client::AdminServiceClient;
use trainyard_proto::v1::enroll_service_client::EnrollServiceClient;
use trainyard_proto::v1::job_service_client::JobServiceClient;
use trainyard_proto::v1::node_service_client::NodeServiceClient;
use trainyard_transport::enrol::enrol;
use trainyard_transport::pki::{KeyPairPem, inspect_pem};
use trainyard_transport::token::Secret;

use crate::harness::{
    Head, anonymous, channel, enroll_client, every_rpc, refusal, submission, submit,
};

/// Calls any RPC with an empty message.
async fn call(channel: &Channel, path: &str) -> Result<(), tonic::Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let path: PathAndQuery = path.parse().unwrap();
    grpc.unary(tonic::Request::new(()), path, codec)
        .await
        .map(drop)
}

#[tokio::test]
async fn without_a_certificate_nothing_but_enrolment_answers() {
    let head = Head::start().await;
    let channel = anonymous(&head).await;
    let mut paths = every_rpc();
    paths.push("/grpc.health.v1.Health/Check".to_owned());
    paths.push("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo".to_owned());
    paths.push("/trainyard.v1.JobService/Nothing".to_owned());
    for path in paths {
        let refused = refusal(call(&channel, &path).await);
        if path.ends_with("EnrollService/Enroll") {
            assert_eq!(refused.code, ErrorCode::Invalid, "{path}: {refused}");
        } else {
            assert_eq!(
                refused.code,
                ErrorCode::Unauthenticated,
                "{path}: {refused}"
            );
            assert_eq!(
                refused.message,
                "certificate required; run yard login or yard join"
            );
        }
    }
    let known = call(&head.channel().await, "/trainyard.v1.JobService/Nothing").await;
    assert_eq!(refusal(known).code, ErrorCode::Unimplemented);
}

#[tokio::test]
async fn a_node_may_not_act_as_a_user_nor_a_user_as_a_node() {
    let head = Head::start().await;
    let agent = head.node("n").await;
    let refused = JobServiceClient::new(agent.channel.clone())
        .submit(submission("r"))
        .await;
    assert_eq!(refusal(refused).code, ErrorCode::PermissionDenied);
    let refused = call(&head.channel().await, "/trainyard.v1.AgentService/PushLogs").await;
    assert_eq!(refusal(refused).code, ErrorCode::PermissionDenied);
    let mut admin = AdminServiceClient::new(agent.channel.clone());
    let me = admin
        .who_am_i(v1::WhoAmIRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        me.identity,
        Some(v1::who_am_i_response::Identity::Node(agent.node().0))
    );
    assert_eq!(me.cluster, head.coordinator.cluster().0);
}

#[tokio::test]
async fn roles_and_ownership_bound_what_users_do() {
    let head = Head::start().await;
    let viewer = channel(&head.user("vera", v1::Role::Viewer).await).await;
    let refused = JobServiceClient::new(viewer.clone())
        .submit(submission("r"))
        .await;
    assert_eq!(refusal(refused).code, ErrorCode::PermissionDenied);
    let job = submit(&head, "r").await;
    let seen = JobServiceClient::new(viewer)
        .get(v1::GetJobRequest { job })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(seen.job.unwrap().owner, "root");

    let ursel = channel(&head.user("ursel", v1::Role::User).await).await;
    let mut ursels = JobServiceClient::new(ursel.clone());
    let refused = refusal(ursels.cancel(v1::CancelJobRequest { job }).await);
    assert_eq!(
        (refused.code, refused.reason.as_str()),
        (ErrorCode::PermissionDenied, "NOT_OWNER")
    );
    let own = ursels.submit(submission("r")).await.unwrap().into_inner();
    assert!(
        own.job != job && !own.repeated_request,
        "request ids are each user's own"
    );
    ursels
        .cancel(v1::CancelJobRequest { job: own.job })
        .await
        .unwrap();
    let refused = NodeServiceClient::new(ursel)
        .remove(v1::RemoveNodeRequest { node: 1 })
        .await;
    assert_eq!(refusal(refused).code, ErrorCode::PermissionDenied);

    let olaf = channel(&head.user("olaf", v1::Role::Operator).await).await;
    let mut olafs = JobServiceClient::new(olaf.clone());
    let cancelled = olafs
        .cancel(v1::CancelJobRequest { job })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(cancelled.job.unwrap().state(), v1::JobState::Cancelled);
    let refused = AdminServiceClient::new(olaf)
        .list_tokens(v1::ListTokensRequest {})
        .await;
    assert_eq!(refusal(refused).code, ErrorCode::PermissionDenied);
    let elsewhere = olafs.submit(v1::SubmitRequest {
        spec: Some(v1::JobSpec {
            workspace: "other".to_owned(),
            ..submission("x").spec.unwrap()
        }),
        ..submission("x")
    });
    assert_eq!(refusal(elsewhere.await).code, ErrorCode::NotFound);
}

#[tokio::test]
async fn bad_tokens_all_get_the_same_answer_and_good_ones_work_as_often_as_they_say() {
    let head = Head::start().await;
    let token = head.node_token(1).await;
    let csr = KeyPairPem::generate().unwrap().csr().unwrap();
    let request = |id: u64, secret: &[u8], csr: &str| v1::EnrollRequest {
        token: id,
        secret: secret.to_vec(),
        certificate_request: csr.to_owned(),
        name: "box".to_owned(),
    };
    let mut client = enroll_client(&head).await;
    let other = Secret::generate().unwrap();
    let unknown = refusal(
        client
            .enroll(request(999, token.secret.as_bytes(), &csr))
            .await,
    );
    let wrong = refusal(
        client
            .enroll(request(token.id.0, other.as_bytes(), &csr))
            .await,
    );
    let short = refusal(client.enroll(request(token.id.0, b"short", &csr)).await);
    assert!(
        unknown == wrong && wrong == short,
        "{unknown:?} {wrong:?} {short:?}"
    );
    assert_ne!(unknown.code, ErrorCode::Invalid);
    // A request that cannot be signed does not cost the token's one use.
    let nonsense = refusal(
        client
            .enroll(request(token.id.0, token.secret.as_bytes(), "nonsense"))
            .await,
    );
    assert_eq!(nonsense.field.as_deref(), Some("certificate_request"));
    let huge = "x".repeat(20 << 10);
    let huge = refusal(
        client
            .enroll(request(token.id.0, token.secret.as_bytes(), &huge))
            .await,
    );
    assert_eq!(huge.reason, "MESSAGE_TOO_LARGE");

    let credentials = enrol(&token, "box").await.unwrap();
    assert_eq!(credentials.identity.to_string(), "node/1");
    let used_up = refusal(
        client
            .enroll(request(token.id.0, token.secret.as_bytes(), &csr))
            .await,
    );
    assert_eq!(used_up, unknown);

    let revoked = head.node_token(5).await;
    let mut admin = head.admin().await;
    let listed = admin
        .list_tokens(v1::ListTokensRequest {})
        .await
        .unwrap()
        .into_inner()
        .tokens;
    assert_eq!(
        listed.iter().map(|token| token.id).collect::<Vec<_>>(),
        [revoked.id.0]
    );
    admin
        .revoke_token(v1::RevokeTokenRequest {
            token: revoked.id.0,
        })
        .await
        .unwrap();
    let refused = refusal(
        client
            .enroll(request(revoked.id.0, revoked.secret.as_bytes(), &csr))
            .await,
    );
    assert_eq!(refused, unknown);
}

#[tokio::test]
async fn certificates_are_renewed_for_whoever_calls_and_nobody_else() {
    let head = Head::start().await;
    let agent = head.node("n").await;
    let key = KeyPairPem::generate().unwrap();
    let request = v1::RenewRequest {
        certificate_request: key.csr().unwrap(),
    };
    let mut client = EnrollServiceClient::new(agent.channel.clone());
    let renewed = client.renew(request).await.unwrap().into_inner();
    let info = inspect_pem(&renewed.certificate).unwrap();
    assert_eq!(info.spiffe.identity, agent.credentials.identity);
    assert_eq!(info.spiffe.cluster, head.coordinator.cluster());
    assert_eq!(renewed.ca, agent.credentials.ca_pem);
}

#[tokio::test]
async fn a_removed_node_is_cut_off_and_refused() {
    let head = Head::start().await;
    let agent = head.node("n").await;
    let (mut session, _) = agent.open(&[]).await;
    let mut nodes = head.nodes().await;
    let node = agent.node().0;
    nodes.remove(v1::RemoveNodeRequest { node }).await.unwrap();
    session.end().await;
    let again = refusal(
        AdminServiceClient::new(channel(&agent.credentials).await)
            .who_am_i(v1::WhoAmIRequest {})
            .await,
    );
    assert_eq!(
        (again.code, again.reason.as_str()),
        (ErrorCode::Unauthenticated, "NODE_REMOVED")
    );
    let gone = refusal(nodes.get(v1::GetNodeRequest { node }).await);
    assert_eq!(gone.code, ErrorCode::NotFound);
}

#[tokio::test]
async fn reflection_tells_those_who_are_known_about_every_service() {
    let head = Head::start().await;
    let mut reflection = ServerReflectionClient::new(head.channel().await);
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = reflection
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("no list of services in {answer:?}");
    };
    let names: Vec<_> = list
        .service
        .iter()
        .map(|service| service.name.as_str())
        .collect();
    for service in ["Job", "Node", "Agent", "Log", "Blob", "Enroll", "Admin"] {
        let name = format!("trainyard.v1.{service}Service");
        assert!(
            names.contains(&name.as_str()),
            "{name} is not among {names:?}"
        );
    }
}

#[tokio::test]
async fn health_answers_those_who_are_known() {
    let head = Head::start().await;
    let mut health = HealthClient::new(head.channel().await);
    let answer = health
        .check(HealthCheckRequest {
            service: String::new(),
        })
        .await
        .unwrap();
    assert_eq!(answer.into_inner().status, 1);
}
