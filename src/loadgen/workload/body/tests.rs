use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::loadgen::{
    engine::tokenizer::pieces::Pieces,
    workload::{Workload, random},
};

fn request(parts: &[(u64, u32)]) -> Planned {
    let parts: Vec<Part> = parts.iter().map(|&(seed, tokens)| Part { seed, tokens }).collect();
    let prompt = Prompt { parts: parts.into() };
    Planned { at: None, burst: None, prompt, max_tokens: 17, group: 0, after: None }
}

fn joined(writer: &mut BodyWriter, request: &Planned) -> Value {
    serde_json::from_slice(&writer.write(request).concat()).unwrap()
}

#[test]
fn bodies_ask_for_what_is_planned() {
    let mut writer = BodyWriter::new(BodyForm::Ids, "a \"b\"");
    let body = joined(&mut writer, &request(&[(1, 3), (2, 2)]));
    assert_eq!(
        body,
        serde_json::json!({
            "model": "a \"b\"", "prompt": body["prompt"], "max_tokens": 17, "temperature": 0,
            "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
        })
    );
    assert_eq!(body["prompt"].as_array().unwrap().len(), 5);
    assert_eq!(writer.path(), "/v1/completions");
    let mut chat = BodyWriter::with_stream(BodyForm::Chat, "m", false);
    let body = joined(&mut chat, &request(&[(1, 3)]));
    assert_eq!(chat.path(), "/v1/chat/completions");
    assert_eq!(body["messages"][0]["role"], "user");
    assert_eq!(body.get("stream"), None);
}

#[test]
fn words_are_a_token_each() {
    for word in WORDS {
        assert_eq!(Pieces.encode(word).len(), 1, "{word}");
    }
    let distinct: std::collections::HashSet<_> = WORDS.into_iter().collect();
    assert_eq!(distinct.len(), WORDS.len());
    let mut writer = BodyWriter::new(BodyForm::Text, "m");
    let body = joined(&mut writer, &request(&[(1, 40), (2, 24)]));
    let text = body["prompt"].as_str().unwrap();
    assert_eq!(text.split(' ').count(), 64);
    assert_eq!(Pieces.encode(text).len(), 64);
}

#[test]
fn a_shared_part_is_written_once() {
    let mut writer = BodyWriter::new(BodyForm::Ids, "m");
    let bodies: Vec<Vec<Bytes>> =
        (10..14).map(|unique| writer.write(&request(&[(1, 600), (unique, 120)]))).collect();
    assert_eq!(bodies[0].len(), 2, "nothing is known of the first one");
    assert_eq!(bodies[2][1].as_ptr(), bodies[3][1].as_ptr());
    assert_eq!(writer.known.len(), 1, "unique parts are not remembered");
    assert_eq!(writer.known_bytes, 3_600);
}

#[test]
fn what_is_remembered_is_bounded() {
    let mut writer = BodyWriter::new(BodyForm::Ids, "m");
    let tokens = (REMEMBERED / 6 / 4) as u32;
    for seed in 1..=6 {
        for _ in 0..2 {
            writer.write(&request(&[(seed, tokens)]));
        }
        assert!(writer.known_bytes <= REMEMBERED);
        assert_eq!(writer.known_bytes, writer.known.values().map(Bytes::len).sum::<usize>());
    }
    assert!(writer.known.len() < 5);
}

#[test]
fn groups_share_the_bytes_of_their_prefix() {
    let workload: Workload = "capacity-73:scale=0.1".parse().unwrap();
    let mut writer = BodyWriter::new(BodyForm::Ids, "m");
    let requests = workload.requests(1, 1_500);
    for request in &requests {
        let body = joined(&mut writer, request);
        let ids: Vec<u32> = serde_json::from_value(body["prompt"].clone()).unwrap();
        assert!(ids.iter().copied().eq(tokens(&request.prompt)));
    }
}

proptest! {
    /// Whatever is known of it, a body is the same, and its tokens are those of its parts.
    #[test]
    fn what_is_remembered_does_not_change_bodies(
        prompts in prop::collection::vec(prop::collection::vec((0..4_u64, 1..30_u32), 1..5), 1..12),
    ) {
        for form in [BodyForm::Ids, BodyForm::Text, BodyForm::Chat] {
            let mut writer = BodyWriter::new(form, "m");
            for parts in &prompts {
                let parts: Vec<_> =
                    parts.iter().map(|&(seed, tokens)| (random::mix(seed), tokens)).collect();
                let request = request(&parts);
                let body = writer.write(&request).concat();
                prop_assert_eq!(&body, &BodyWriter::new(form, "m").write(&request).concat());
                let value: Value = serde_json::from_slice(&body).unwrap();
                if form == BodyForm::Ids {
                    let want: Vec<u32> = tokens(&request.prompt).collect();
                    prop_assert_eq!(&value["prompt"], &Value::from(want));
                }
            }
        }
    }
}
