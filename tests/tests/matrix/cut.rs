//! The sites between the VMMs: the control stream goes by a relay, which asks at the gate as an agent does.

use std::sync::Arc;

use ferry_proto::stream::v1::{FromDestination, FromSource};
use ferry_rpc::faults::{Moment, Site, Word};
use ferry_tests::messages::{Observer, Passing, Side, Speaker};
use prost::Message;

use crate::gate::Shared;

/// Whoever stands between the VMMs and asks at this gate.
pub(crate) fn between_the_vmms(gate: Arc<Shared>) -> Observer {
    Observer::new(move |speaker, side, message| {
        let Some(site) = site_of(speaker, message) else {
            return Passing::Once;
        };
        let moment = match side {
            Side::Before => Moment::Before,
            Side::After => Moment::After,
        };
        match gate.pass("wire", moment, site) {
            Word::Go => Passing::Once,
            Word::Lose => Passing::Cut,
            Word::Double => Passing::Twice,
        }
    })
}

fn site_of(speaker: Speaker, message: &[u8]) -> Option<Site> {
    match speaker {
        Speaker::Source => FromSource::decode(message).ok()?.message.as_ref().map(Site::from),
        Speaker::Destination => FromDestination::decode(message).ok()?.message.as_ref().map(Site::from),
    }
}
