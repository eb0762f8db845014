//! The connections under the calls of `Streams.Carry`.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic::codegen::Service;
use tonic::codegen::http::Uri;

use crate::agent::data_port::fit_buffers;

/// Opens one as the data port's are opened: what is said in it goes at once, and little is under way within one machine.
#[derive(Clone, Copy, Debug)]
pub(in crate::agent) struct Connector;

impl Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, io::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, peer: Uri) -> Self::Future {
        Box::pin(async move {
            // An IPv6 address is in brackets in a URL.
            let host = peer.host().unwrap_or_default().trim_matches(['[', ']']);
            let stream = TcpStream::connect((host, peer.port_u16().unwrap_or(80))).await?;
            stream.set_nodelay(true)?;
            fit_buffers(&stream)?;
            Ok(TokioIo::new(stream))
        })
    }
}
