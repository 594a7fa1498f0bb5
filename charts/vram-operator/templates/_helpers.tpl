{{- define "vram-operator.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- define "vram-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "vram-operator.labels" -}}
{{ include "vram-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: vram-operator
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "vram-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "vram-operator.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{/* The reference of an image: a list of the values and the chart's appVersion. */}}
{{- define "vram-operator.image" -}}
{{- $image := index . 0 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default (index . 1) $image.tag }}
{{- end -}}
{{- end }}

{{/* What the operator may do in the namespaces that it serves; nothing else. */}}
{{- define "vram-operator.rules" -}}
- apiGroups: [vram.dev]
  resources: [gpumodelworkloads]
  verbs: [get, list, watch, patch]
- apiGroups: [vram.dev]
  resources: [gpupodrestarts]
  verbs: [get, list, watch, create, delete]
- apiGroups: [vram.dev]
  resources: [gpumodelworkloads/status, gpupodrestarts/status]
  verbs: [update, patch]
# Owner references that block deletion need this where an admission plugin guards them.
- apiGroups: [vram.dev]
  resources: [gpumodelworkloads/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch{{ if .Values.allowDelete }}, delete{{ end }}]
- apiGroups: [""]
  resources: [pods/eviction]
  verbs: [create]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch]
- apiGroups: [apps]
  resources: [statefulsets]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [services, configmaps]
  verbs: [get, list, watch, create, patch]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end }}
