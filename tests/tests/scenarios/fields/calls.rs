//! Calls of any method with any bytes, as a client in another language might make them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use prost::Message as _;
use prost::bytes::{Buf, BufMut};
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};
use tokio::runtime::Runtime;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// How long an agent may take for one call on a busy machine, before it counts as hung.
const PATIENCE: Duration = Duration::from_secs(30);

/// A method of the agent's.
#[derive(Clone, Debug)]
pub(crate) struct Method {
    /// `/package.Service/Method`
    path: String,
    pub(crate) name: String,
    pub(crate) input: MessageDescriptor,
}

/// All methods of all services, as the build described them.
pub(crate) fn methods() -> Result<Vec<Method>> {
    let pool = DescriptorPool::decode(ferry_proto::AGENT_DESCRIPTORS)?;
    let mut methods = Vec::new();
    for service in pool.services() {
        for method in service.methods() {
            methods.push(Method {
                path: format!("/{}/{}", service.full_name(), method.name()),
                name: method.name().to_owned(),
                input: method.input(),
            });
        }
    }
    ensure!(methods.len() > 30, "only {} methods", methods.len());
    Ok(methods)
}

/// A connection to one agent.
pub(crate) struct Caller {
    runtime: Runtime,
    channel: Channel,
}

impl Caller {
    pub(crate) fn connect(url: &str) -> Result<Self> {
        let runtime = Runtime::new()?;
        let endpoint = Endpoint::from_shared(url.to_owned())?.connect_timeout(PATIENCE);
        let channel = runtime.block_on(endpoint.connect()).context("failed to connect")?;
        Ok(Self { runtime, channel })
    }

    /// Calls the method, and tells its status: of a stream that of the first answer.
    ///
    /// # Errors
    /// It did not answer in time.
    pub(crate) fn call(&self, method: &Method, message: &DynamicMessage) -> Result<Result<(), Status>> {
        self.call_raw(method, message.encode_to_vec())
    }

    /// The same with bytes that need not be a message.
    pub(crate) fn call_raw(&self, method: &Method, bytes: Vec<u8>) -> Result<Result<(), Status>> {
        let path: PathAndQuery = method.path.parse()?;
        let mut client = Grpc::new(self.channel.clone());
        let answered = async {
            client
                .ready()
                .await
                .map_err(|error| Status::unknown(error.to_string()))?;
            let request = Request::new(tokio_stream::iter([bytes]));
            let mut answers = client.streaming(request, path, Raw).await?.into_inner();
            answers.message().await.map(drop)
        };
        let in_time = self
            .runtime
            .block_on(async { tokio::time::timeout(PATIENCE, answered).await });
        in_time.with_context(|| format!("{} did not answer", method.name))
    }
}

/// Messages as they are.
#[derive(Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut bytes = vec![0; buffer.remaining()];
        buffer.copy_to_slice(&mut bytes);
        Ok(Some(bytes))
    }
}
