//! llm-d's `indexer.v1.IndexerService`.
//!
//! Its only call carries the prompt as text, so it needs a tokenizer. A pod with ranks scores the
//! maximum over them; pods that score 0 are absent.

use std::collections::{BTreeMap, HashSet};

use tokio::time::Instant;

use crate::{
    indexer::{
        ScoreError,
        service::{
            Inner,
            request::{Head, Text, check_pods, tokenized},
        },
    },
    proto::{kvindexer as pb, llmd},
};

impl Inner {
    pub(super) async fn get_pod_scores(
        &self,
        request: llmd::GetPodScoresRequest,
        arrival: Instant,
        call: Option<Instant>,
    ) -> Result<llmd::GetPodScoresResponse, ScoreError> {
        if request.model_name.is_empty() {
            return Err(ScoreError::invalid("model_name", "must not be empty"));
        }
        check_pods(&self.config, "pod_identifiers", &request.pod_identifiers)?;
        let prompt = pb::Prompt {
            input: Some(pb::prompt::Input::Text(request.prompt)),
            ..pb::Prompt::default()
        };
        let score = pb::ScoreRequest { model: request.model_name, ..pb::ScoreRequest::default() };
        let head = Head::check(&self.config, &score, arrival, call)?;
        let text = Text::Allowed(self.tokenizer.as_ref());
        let input = tokenized(&self.config, &head, 0, &prompt, text).await.map_err(named)?;
        let keys = head.keys("", 0, &prompt, &input)?;
        head.in_time(0, 1)?;
        let (table, mut found) = (self.fleet.table(), Vec::new());
        self.look_up(&table, &head.model, &keys, false, &mut found);
        let asked: HashSet<&str> = request.pod_identifiers.iter().map(String::as_str).collect();
        let wanted = |pod: &str| asked.is_empty() || asked.contains(pod);
        let (mut scores, mut best) = (BTreeMap::<&str, f64>::new(), 0);
        for found in &found {
            let Some(row) = table.slot(found.slot) else { continue };
            if found.score > 0.0 && wanted(&row.id.pod) {
                let score = scores.entry(&row.id.pod).or_default();
                *score = score.max(found.score);
                best = best.max(found.depth);
            }
        }
        self.metrics.prompt(keys.len(), best);
        let row = |(pod, score): (&str, f64)| llmd::PodScore { pod: pod.to_owned(), score };
        Ok(llmd::GetPodScoresResponse { scores: scores.into_iter().map(row).collect() })
    }
}

/// The error with the field name of llm-d's request.
fn named(error: ScoreError) -> ScoreError {
    let field = "prompt".to_owned();
    match error {
        ScoreError::Invalid { why, .. } => ScoreError::Invalid { field, why },
        ScoreError::Tokenize { error, .. } => ScoreError::Tokenize { field, error },
        ScoreError::NoTokenizer { model, .. } => ScoreError::NoTokenizer { field, model },
        other => other,
    }
}
